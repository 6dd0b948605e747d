"""A U-Net, a sampler and the updates of training on the Triton kernels give what the reference gives."""

import sys
from pathlib import Path

import pytest
import torch
from helpers import on_reference, with_reference
from operations import draw, error

from fastdiff import blocks, samplers
from fastdiff.denoiser import Denoiser, DenoiserConfig, Guided
from fastdiff.losses import regression
from fastdiff.losses.batch import Batch
from fastdiff.unet import UNetConfig
from kernels.fused.launch import listen
from train.options import LoopOptions
from train.stage1 import student_of
from train.updater import Updater

BATCH = 2
TINY = UNetConfig(
    (8, 8),
    3,
    10,
    channels=16,
    channel_mult=(1, 2),
    blocks=1,
    attention_resolutions=(4,),
    head_width=16,
    middle_attention=False,
)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """With all that is fused there; but the interpreter takes its time for each program: none are to fill a GPU."""
    monkeypatch.setattr(blocks, "fuses", lambda x: True)
    monkeypatch.setattr(sys.modules["kernels.fused.group_norm"], "multiprocessors", lambda device: 1)


def teacher(device: str) -> Denoiser:
    torch.manual_seed(0)
    denoiser = Denoiser(DenoiserConfig(TINY)).to(device)
    for index, parameter in enumerate(denoiser.parameters()):  # new branches are zero: give each something to do
        parameter.data.add_(draw(*parameter.shape, seed=index, device=device), alpha=0.1)
    return denoiser.eval()


def inputs(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z, φ and the labels."""
    z = draw(BATCH, 3, 8, 8, device=device, channels_last=True)
    return z, torch.linspace(0.1, 1.5, BATCH, device=device), torch.arange(BATCH, device=device)


def batch(device: str) -> Batch:
    x, _, label = inputs(device)
    return Batch(x.clamp(-1, 1), label, label + 2**33, seed=7)


def test_the_forward_and_backward_pass(device):
    denoiser = teacher(device)
    z, angle, label = inputs(device)
    wanted = (z.requires_grad_(), *denoiser.parameters())

    def results():
        out = denoiser(z, angle, label)
        return out, *torch.autograd.grad(out, wanted, draw(*out.shape, seed=9, device=device))

    ours, theirs = with_reference(results)
    assert error(ours[0], theirs[0]) < 1e-5
    for one, other in zip(ours, theirs, strict=True):
        assert error(one, other) < 1e-4 or (one - other).abs().max() < 1e-5 * theirs[0].abs().max()


def test_half_precision_is_as_good_as_the_references(device):
    denoiser, arguments = teacher(device), inputs(device)
    with torch.no_grad():
        exact = on_reference(denoiser, *arguments)
        with torch.autocast(device, torch.bfloat16):
            ours, theirs = with_reference(denoiser, *arguments)
    assert error(ours, exact) < 1.5 * error(theirs, exact)


def recorded(function):
    """(what it returns, the names of the kernels' files that it launched)."""
    seen = set()
    with listen(lambda launch: seen.add(launch.kernel.fn.__module__.removeprefix("kernels.fused."))):
        result = function()
    return result, seen


def test_a_guided_ddim_step(device):
    model = Guided(teacher(device))
    noise, _, label = inputs(device)

    @torch.no_grad()
    def sample():
        return samplers.ddim(model, noise, label, 1.5, 2, schedule=model.schedule, clip=1.0)

    ours, used = recorded(sample)
    assert error(ours, on_reference(sample)) < 1e-5
    assert used == {"affine_update", "group_norm_one_pass", "resample", "attention"}


@pytest.mark.parametrize("recipe", ["teacher", "stage1", "stage2"])
def test_an_update_of_each_recipe(device, recipe):
    """Loss and gradients of one update: Adam would blow up the last digits of small gradients."""
    first = teacher(device)
    student = student_of(first, (0.0, 4.0)).to(device).eval()
    losses = {
        "teacher": (first, regression.teacher),
        "stage1": (student, lambda m, b: regression.stage1(m, Guided(teacher(device)), b, guidance_range=(0.0, 4.0))),
        "stage2": (student, lambda m, b: regression.stage2(m, student, b, steps=4, guidance_range=(0.0, 4.0))),
    }
    model, loss = losses[recipe]
    gradients = []

    def update():
        trained = Denoiser(model.config).to(device)
        trained.load_state_dict(model.state_dict())
        options = LoopOptions(out=Path("unused"), batch_size=BATCH, lr=1e-3, warmup=0, dropout=0.0)
        updater = Updater(options, trained, loss)
        for parameter in trained.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.clone()))
        updater.update(batch(device))
        return float(updater.loss_sum)

    loss_here, used = recorded(update)
    ours, gradients = gradients, []
    loss_there = on_reference(update)
    assert loss_here == pytest.approx(loss_there, rel=1e-5)
    of_networks = {"group_norm_one_pass", "group_norm", "resample", "attention"}
    assert {"affine_update", "regression_loss"} | of_networks <= used
    assert len(ours) == len(gradients) > 10
    largest = max(gradient.abs().max() for gradient in gradients)
    for one, other in zip(ours, gradients, strict=True):
        assert error(one, other) < 1e-4 or (one - other).abs().max() < 1e-6 * largest


def test_the_network_compiles_without_graph_breaks(device):
    network, arguments = teacher(device).network, inputs(device)
    ours, plain = (f(*arguments) for f in (torch.compile(network, fullgraph=True, backend="aot_eager"), network))
    assert error(ours, plain) < 1e-6
    (first,), (second,) = (torch.autograd.grad(out.square().sum(), network.conv_in.weight) for out in (ours, plain))
    assert error(first, second) < 1e-5
