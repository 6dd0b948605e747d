"""The ledger of a pass on a GPU: its bytes by hand, its times against an H100's, and limits that it may only lower."""

import json
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from fastdiff import blocks, unet
from kernels import reference

ledger = pytest.importorskip("benchmarks.ledger", reason="needs Triton", exc_type=ImportError)

SIZES = {"cifar10": 256, "imagenet64": 64}
# preset -> (launches, GB of all but convolutions, products and attention), forward, and with the backward pass
LIMITS = {
    "cifar10": ((242, 13.07), (678, 30.72)),
    "imagenet64": ((477, 20.78), (1227, 51.10)),
}
MEASURED = {  # ms by kind, forward, and with the backward pass: NVIDIA H100 80GB HBM3, PyTorch 2.11, Triton 3.6
    "convolutions": (11.8, 33.0),
    "biases": (5.8, 12.8),
    "GroupNorm": (5.15, 11.4),
    "sums of images": (1.6, 7.2),
    "pooling, upsampling": (2.05, 5.9),
    "concatenation": (1.2, None),
}
TOTALS = {"cifar10": (31.4, 87.4), "imagenet64": (45.9, 138.8)}  # ms


@pytest.fixture(scope="module")
def found() -> dict:
    return {preset: list(ledger.passes(preset, batch).values()) for preset, batch in SIZES.items()}


def a_sum_and_a_norm(x, h, skip, *norm, x_bias, scale, silu):
    total = x if h is None else x + h
    return ledger.kernels.group_norm(total, *norm, silu=silu), total, total


@pytest.fixture(scope="module")
def as_measured() -> dict:
    """The U-Net as it was on that day, of more operations of PyTorch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "fuses", lambda x: False)
        patch.setattr(unet, "as_autocast", lambda network, device: nullcontext())
        patch.setattr(ledger.kernels, "residual_sum", lambda x, h, **of_other_networks: x + h)
        patch.setattr(ledger.kernels, "residual_norm", a_sum_and_a_norm)
        for name in ("downsample", "upsample"):
            patch.setattr(ledger.kernels, name, getattr(reference, name))
        return {preset: list(ledger.passes(preset, batch).values()) for preset, batch in SIZES.items()}


@pytest.mark.parametrize("preset", SIZES)
@pytest.mark.parametrize("both", [0, 1], ids=["forward", "with backward"])
def test_launches_and_bytes_do_not_rise(found, preset, both):
    launches, gigabytes = LIMITS[preset][both]
    here = found[preset][both]
    assert (here.total.launches, round(here.traffic / 1e9, 2)) <= (launches, gigabytes)
    assert here.total.launches <= launches and here.traffic / 1e9 <= gigabytes + 0.005
    assert here.total.launches > 0.97 * launches and here.traffic / 1e9 > 0.97 * gigabytes, "lower LIMITS"


@pytest.mark.parametrize("kind", MEASURED)
def test_times_by_kind_are_those_of_an_h100(as_measured, kind):
    for here, measured in zip(as_measured["cifar10"], MEASURED[kind], strict=True):
        if measured is not None:
            assert 1e3 * here.entries[kind].seconds == pytest.approx(measured, rel=0.15)


def test_attention_and_its_products_together(as_measured):
    for here, measured in zip(as_measured["cifar10"], (1.7, 6.0), strict=True):
        ms = 1e3 * sum(here.entries[kind].seconds for kind in ("attention", "matrix products"))
        assert ms == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("preset", SIZES)
def test_total_times_are_those_of_an_h100(as_measured, preset):
    """The measured ones hold some time of no kind: 7 % with the backward pass."""
    for here, measured in zip(as_measured[preset], TOTALS[preset], strict=True):
        assert 1e3 * here.total.seconds == pytest.approx(measured, rel=0.15)


def test_bytes_and_operations_of_a_convolution():
    x, weight = (torch.empty(s, device="meta", requires_grad=True) for s in ((2, 8, 16, 16), (4, 8, 3, 3)))
    bias = torch.empty(4, device="meta", requires_grad=True)
    with ledger.Ledger() as one:
        y = F.conv2d(x, weight, bias, padding=1)
    images, weights = 4 * 2 * 256 * (8 + 4), 4 * 4 * 8 * 9
    assert one.entries["convolutions"].bytes == images + weights + 16
    assert one.entries["convolutions"].operations == 2 * (2 * 256 * 4) * 8 * 9
    assert one.entries["biases"].bytes == 2 * y.numel() * 4 and one.total.launches == 2
    with ledger.Ledger() as two:
        y.backward(torch.empty_like(y))
    assert two.entries["convolutions"].operations == 2 * one.entries["convolutions"].operations
    assert two.entries["biases"].bytes == y.numel() * 4 and two.total.launches == 3


def test_a_kernel_of_ours_is_entered_with_its_tensors():
    x = torch.empty(256, 256, 8, 8, device="meta", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight = torch.empty(256, device="meta")
    with ledger.kernels.use("triton"), ledger.Ledger() as one:
        ledger.kernels.group_norm(x, 32, weight, weight)
    assert one.entries["GroupNorm"].launches == 1
    assert one.entries["GroupNorm"].bytes == 2 * 2 * x.numel() + 4 * 256 + 2 * 4 * 256 * 32


def test_a_list_of_tensors_takes_as_many_launches_as_it_fills():
    few, many, large = ([torch.empty(n, device="meta")] * count for n, count in ((8, 3), (8, 250), (320 * 65536, 2)))
    for tensors, launches in ((few, 1), (many, 3), (large, 2)):
        with ledger.Ledger() as one:
            torch._foreach_mul_(tensors, 2.0)
        assert one.total.launches == launches


@pytest.mark.parametrize("recipe", ledger.RECIPES)
def test_updates(recipe):
    (one,) = ledger.update("digits", recipe, 8).values()
    assert one.entries["optimizer, average"].launches > 3
    calls = {"teacher": 1, "stage1": 2, "stage2": 3}[recipe]
    (forward, both) = ledger.passes("digits", 8).values()
    extra = (calls - 1) * forward.entries["convolutions"].launches
    assert one.entries["convolutions"].launches == both.entries["convolutions"].launches + extra


def test_the_command(tmp_path, capsys):
    file = tmp_path / "ledger.json"
    assert ledger.main(["--preset", "digits", "--batch", "4", "--json", str(file)]) == 0
    assert "GroupNorm" in capsys.readouterr().out
    assert json.loads(file.read_text())["forward"]["all"]["launches"] > 10
    for arguments in (["--preset", "H99"], ["--batch", "0"], ["--update", "none"]):
        with pytest.raises(SystemExit) as ended:
            ledger.main(arguments)
        assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
