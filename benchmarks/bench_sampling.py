"""One network call and one optimizer update of the digits preset: `make bench`.

Compare rows of one run only: absolute times are this machine's. Guided and student steps run on the same batch.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastdiff import samplers
from fastdiff.denoiser import Denoiser, DenoiserConfig, Guided
from fastdiff.losses import regression
from fastdiff.losses.batch import Batch
from fastdiff.unet import PRESETS
from train import stage1
from train.options import LoopOptions
from train.updater import Updater

BATCH = 64


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    teacher = Denoiser(DenoiserConfig(PRESETS["digits"])).eval()
    return {"teacher": teacher, "guided": Guided(teacher), "student": stage1.student_of(teacher, (0.0, 4.0)).eval()}


@pytest.mark.benchmark(group="one DDIM step, w = 1")
@pytest.mark.parametrize("name", ["guided", "student"])
def test_step(benchmark, models, name):
    model = models[name]
    noise = torch.randn(BATCH, *model.image_shape).contiguous(memory_format=torch.channels_last)
    label = torch.arange(BATCH) % 10

    @torch.no_grad()
    def step():
        return samplers.ddim(model, noise, label, 1.0, 1, schedule=model.schedule)

    assert benchmark(step).shape == noise.shape


@pytest.mark.benchmark(group="one optimizer update")
@pytest.mark.parametrize("name", ["teacher", "stage1", "stage2"])
def test_update(benchmark, models, name):
    losses = {
        "teacher": regression.teacher,
        "stage1": lambda m, b: regression.stage1(m, models["guided"], b, guidance_range=(0.0, 4.0)),
        "stage2": lambda m, b: regression.stage2(m, models["student"], b, steps=8, guidance_range=(0.0, 4.0)),
    }
    config = replace(DenoiserConfig(PRESETS["digits"]), kind=name)
    if name != "teacher":
        config = models["student"].config
    options = LoopOptions(out=Path("unused"), batch_size=BATCH)
    updater = Updater(options, Denoiser(config), losses[name])
    x = torch.randn(BATCH, 1, 8, 8).contiguous(memory_format=torch.channels_last)
    batch = Batch(x, torch.arange(BATCH) % 10, torch.arange(BATCH), seed=0)
    benchmark(updater.update, batch)
    updater.check_finite()
    assert updater.update_count > 0
