"""What an update holds in memory at most, counted by the storages that are alive."""

import math
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff.denoiser import Denoiser, DenoiserConfig, Guided
from fastdiff.losses import regression
from fastdiff.losses.batch import Batch
from fastdiff.unet import PRESETS
from train.options import LoopOptions
from train.stage1 import student_of
from train.updater import Updater

BATCH = 64
IMAGES = 8  # batches of them: z, the teacher's velocities, the target, …


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations have made and that are still alive; `peak` is the most there were."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            self.note(tensor, counts=False)  # made before, if not seen before
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            self.note(tensor, counts=True)
        return result

    def note(self, tensor, counts):
        if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.sizes:
            storage = tensor.untyped_storage()
            self.sizes[key] = storage.nbytes() if counts else 0
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, key)

    def gone(self, key):
        self.now -= self.sizes.pop(key)


def test_live_bytes_are_those_of_the_tensors_alive():
    before = torch.ones(1000)
    with LiveBytes() as live:
        before.view(10, 100)
        first = torch.ones(1000)
        second = first + 1
        del first
        third = second.view(10, 100)
        assert (live.now, live.peak) == (4000, 8000)
        del second
        assert live.now == 4000
        del third
        assert live.now == 0


def weights(model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def images(model: Denoiser) -> int:
    """Bytes of IMAGES batches."""
    return IMAGES * BATCH * math.prod(model.image_shape) * 4


def peak_of_update(model: Denoiser, loss) -> int:
    """Most bytes above the weights of all models during the second update (the first makes the optimizer's state)."""
    options = LoopOptions(out=Path("unused"), batch_size=BATCH, warmup=0)
    trained = Denoiser(model.config)
    trained.load_state_dict(model.state_dict())
    updater = Updater(options, trained, loss)
    x = torch.randn(BATCH, *model.image_shape).contiguous(memory_format=torch.channels_last)  # no constant
    batch = Batch(x, torch.arange(BATCH) % 10, torch.arange(BATCH), seed=0)
    updater.update(batch)
    with LiveBytes() as live:
        updater.update(batch)
    return live.peak


def one_pass(model: Denoiser, batch: Batch) -> torch.Tensor:
    """The least that an update can be: one call of the student, and back."""
    angle = torch.full((BATCH,), 0.5)
    return model(batch.x, angle, batch.label, angle).square().flatten(1).mean(1)


@pytest.fixture(scope="module", params=["digits", "fashion-mnist"])
def models(request):
    """A teacher, and a student of it."""
    torch.manual_seed(0)
    teacher = Denoiser(DenoiserConfig(PRESETS[request.param])).requires_grad_(False)
    return teacher, student_of(teacher, (0.0, 4.0))


def check(recipe: str, student: Denoiser, loss) -> None:
    """An update holds, beside the models' weights, what one pass of the student holds, and a few images."""
    plain, ours = peak_of_update(student, one_pass), peak_of_update(student, loss)
    size = "×".join(map(str, student.image_shape))
    print(
        f"\n{recipe}, {size}, batch {BATCH}: {ours / 2**20:.1f} MiB above the weights of student and teacher "
        f"({weights(student) / 2**20:.1f} each); one forward and backward pass of the student alone {plain / 2**20:.1f}"
    )
    assert ours <= plain + images(student)
    assert plain > weights(student)  # gradients, and activations


def test_an_update_of_stage_2_holds_the_activations_of_one_student(models):
    teacher = student_of(models[0], (0.0, 4.0)).requires_grad_(False)
    check("stage 2", models[1], lambda m, b: regression.stage2(m, teacher, b, steps=8, guidance_range=(0.0, 4.0)))


def test_an_update_of_stage_1_holds_the_activations_of_one_student(models):
    teacher, student = models
    check("stage 1", student, lambda m, b: regression.stage1(m, Guided(teacher), b, guidance_range=(0.0, 4.0)))
