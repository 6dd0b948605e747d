"""A network that is not the project's goes through every recipe, as the guide shows it."""

import json
import re
from pathlib import Path

import command_lines
import pytest
import torch
from command_lines import assert_refused

from fastdiff import checkpoint, denoiser
from fastdiff.denoiser import with_guidance
from fastdiff.generate import Sampling, generate
from train import encoder, sid, stage2, two_student

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
SMALL = {"updates": 2, "batch_size": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def readme():
    """The examples in Python of the README and of the guide to networks of one's own."""
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text() + (root / "docs/guide/own-network.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def made(readme, tmp_path_factory):
    (example,) = (code for code in readme if "NETWORKS" in code)
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(denoiser, "NETWORKS", dict(denoiser.NETWORKS))
        patch.setattr("train.options.LoopOptions.device", "cpu")
        names = {}
        exec(example, names)
        yield folder, names["Mine"]


def test_the_readme_names_what_there_is(readme):
    assert len(readme) == 2


def test_every_recipe_takes_it(made):
    folder, mine = made
    first, student = folder / "runs/mine-stage1", folder / "runs/mine-stage2/steps-1"
    teacher = checkpoint.load(folder / "runs/mine")
    assert isinstance(teacher.network, mine) and not hasattr(teacher.network, "guidance")
    assert isinstance(with_guidance(teacher), denoiser.Guided)
    loaded = checkpoint.load(student)
    assert isinstance(loaded.network, mine) and loaded.network.guidance.weight.abs().max() > 0
    images = next(generate(loaded, 3, Sampling(guidance=1.0)))
    assert images.shape == (3, 1, 8, 8) and images.isfinite().all() and images.std() > 0.1
    half = {"start_steps": 2, **SMALL}
    encoder.train(encoder.Options(teacher=first, out=folder / "encoder", **half))
    two_student.train(two_student.Options(teacher=folder / "runs/mine", out=folder / "two", guidance=1.0, **half))
    stage2.train(stage2.Options(teacher=first, out=folder / "stochastic", sampler="stochastic", **half))
    sid.train(sid.Options(teacher=first, out=folder / "sid", score_num=8, **SMALL))
    for name in ("encoder/steps-1", "two/steps-1", "stochastic/steps-1", "sid"):
        assert isinstance(checkpoint.load(folder / name).network, mine)


def test_a_new_student_starts_as_the_teacher(made):
    from train.stage1 import student_of

    teacher = checkpoint.load(made[0] / "runs/mine")
    z, angle, label = torch.randn(4, 1, 8, 8), torch.rand(4) + 0.2, torch.arange(4)
    with torch.no_grad():
        found = student_of(teacher, (0.0, 4.0))(z, angle, label, torch.full((4,), 3.0))
        torch.testing.assert_close(found, teacher(z, angle, label))


def test_a_network_that_nothing_builds_is_refused(made, run, monkeypatch):
    """Loading a file never imports anything, so a checkpoint cannot bring its own code."""
    monkeypatch.setattr(denoiser, "NETWORKS", {"unet": denoiser.UNet})
    assert json.loads((made[0] / "runs/mine/model.json").read_text())["network"] == "mine"
    result = run("sample", "--checkpoint", made[0] / "runs/mine", "--device", "cpu", "--out", "grid.png")
    assert_refused(result, "model.json", "'mine'", "fastdiff.denoiser.NETWORKS")
