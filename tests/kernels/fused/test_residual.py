"""The sum of a residual branch and its skip path: values, gradients, and what moves."""

import pytest
import torch
from addresses import assert_last_program_ends_with_its_tensors, launches
from helpers import DTYPES, FEW, HALVES, SEEDS, doubled, on_reference, with_reference
from hypothesis import given
from hypothesis import strategies as st
from operations import assert_no_worse, draw, meta, worst
from torch.library import opcheck
from traffic import traffic, traffic_of

import kernels

SHAPE = (2, 24, 6, 7)


def inputs(shape, dtype=torch.float32, layout="channels_last", biased=True, device="cpu", seed=0):
    """Leaves x, h, x_bias; None where there is no bias."""
    images = [draw(*shape, seed=seed + i, device=device, channels_last=layout == "channels_last") for i in range(2)]
    bias = draw(shape[1], seed=seed + 2, device=device) if biased else None
    return [None if t is None else t.to(dtype).requires_grad_() for t in (*images, bias)]


def summed(x, h, x_bias, scale=1.0):
    return kernels.residual_sum(x, h, x_bias=x_bias, scale=scale)


def in_pytorch(x, h, x_bias, scale):
    return (x + h + x_bias[:, None, None]) * scale


def gradients(y, leaves):
    direction = draw(*y.shape, seed=9, dtype=torch.bfloat16, device=y.device)
    return torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], direction.to(y.dtype))


def results(function, leaves, scale):
    y = function(*leaves, scale)
    return y, *gradients(y, leaves)


@FEW
@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from([1, 5, 16, 70, 96]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    biased=st.booleans(),
    scale=st.sampled_from([1.0, 0.5**0.5]),
    layout=st.sampled_from(["channels_last", "contiguous"]),
    seed=SEEDS,
)
def test_sums_and_their_gradients(device, batch, channels, height, width, biased, scale, layout, seed):
    leaves = inputs((batch, channels, height, width), layout=layout, biased=biased, device=device, seed=seed)
    y, *ours = results(summed, leaves, scale)
    channels_last = leaves[0].is_contiguous(memory_format=torch.channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert worst([y, *ours], on_reference(results, summed, doubled(*leaves), scale)) < 1e-6


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1.0, 0.5**0.5])
def test_half_precision_is_no_worse_than_pytorch(device, dtype, scale):
    leaves = inputs(SHAPE, dtype, device=device)
    ours, eager = (results(function, leaves, scale) for function in (summed, in_pytorch))
    assert {each.dtype for each in ours} == {dtype}
    assert_no_worse(ours, eager, on_reference(results, summed, doubled(*leaves), scale))


def test_images_of_two_dtypes_give_the_wider(device):
    x, h, bias = inputs(SHAPE, device=device)
    h = h.detach().bfloat16().requires_grad_()
    ours, theirs = with_reference(results, summed, [x, h, bias], 0.5)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    assert (ours[0].dtype, ours[2].dtype) == (torch.float32, torch.bfloat16)
    assert worst(ours, theirs) < 1e-6


@pytest.mark.parametrize("channels", [slice(0, 24), slice(24, 48), slice(None, None, 2)])
def test_gradients_that_are_some_channels_of_an_image(device, channels):
    """As those of a concatenation are; every second channel is copied first."""
    leaves = inputs(SHAPE, device=device)
    dy = draw(2, 48, 6, 7, seed=5, device=device, channels_last=True)[:, channels]
    ours, theirs = with_reference(lambda: torch.autograd.grad(summed(*leaves, 0.5), leaves, dy))
    assert worst(ours, theirs) < 1e-6


@pytest.mark.parametrize(
    ("scale", "wanted", "kernels_run"),
    [
        (1.0, [0, 1], []),
        (0.5, [0, 1], ["_gradient_kernel"]),
        (1.0, [0, 2], ["_gradient_kernel", "_total_kernel"]),
        (0.5, [1, 2], ["_gradient_kernel", "_total_kernel"]),
    ],
)
def test_only_what_is_wanted_is_computed(device, scale, wanted, kernels_run):
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(t.detach() for t in inputs(SHAPE, device=device))]
    y = summed(*leaves, scale)
    run = launches(lambda: torch.autograd.grad(y, [leaves[i] for i in wanted], torch.ones_like(y)))
    assert [launch.kernel.__name__ for launch in run] == kernels_run


def test_corners(device):
    assert summed(*inputs((0, 8, 4, 4), device=device)).shape == (0, 8, 4, 4)
    double = inputs(SHAPE, torch.float64, device=device)
    assert torch.equal(*with_reference(summed, *double, 0.5))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_images_move_as_often_as_they_must(device, dtype):
    leaves = inputs((4, 64, 16, 16), dtype, device=device)
    image, small = leaves[0].numel() * dtype.itemsize, 16 * 4 * 64 * 4
    there, back = traffic_of(lambda: summed(*leaves), leaves)
    assert [there.read["x"], there.read["h"], there.written["out"]] == [image] * 3
    assert image < back.total() < image + small
    _, back = traffic_of(lambda: summed(*leaves, 0.5), leaves)
    assert 2 * image < back.total() < 2 * image + small


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [(2, 24, 7, 9), (1, 70, 5, 5), (3, 6, 23, 25)])
def test_tiles_that_reach_beyond_the_image_touch_nothing_there(device, shape):
    leaves = inputs(shape, device=device)
    with traffic():
        found = results(summed, leaves, 0.5)
    assert worst(found, on_reference(results, summed, doubled(*leaves), 0.5)) < 1e-6


@pytest.mark.interpreter
def test_offsets_have_64_bits():
    x, bias = meta(131073, 256, 8, 8, dtype=torch.bfloat16), meta(256)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()

    def forward_and_backward():
        y = kernels.residual_sum(x, x, x_bias=bias, scale=0.5)
        torch.autograd.grad(y, x, torch.empty_like(y))

    large = launches(forward_and_backward)
    assert len(large) == 2
    for one in large:
        assert_last_program_ends_with_its_tensors(one)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_opcheck(device, scale):
    x, h, bias = (t.detach() for t in inputs(SHAPE, device=device))
    opcheck(torch.ops.fastdiff.residual_sum.default, (x, h, bias, scale))
    opcheck(torch.ops.fastdiff.residual_sum_backward.default, (x, scale, True, torch.bfloat16))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(device, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(summed, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in (SHAPE, (3, 16, 4, 4)):
        leaves = inputs(shape, device=device)
        ours, plain = (results(function, leaves, 0.5) for function in (compiled, summed))
        assert all(map(torch.equal, ours, plain))


def test_second_derivatives_of_what_a_kernel_computes_raise(device):
    leaves = inputs(SHAPE, device=device)
    (first,) = torch.autograd.grad(summed(*leaves, 0.5).square().sum(), leaves[2], create_graph=True)
    with pytest.raises(RuntimeError, match="residual_sum_backward: no second derivative"):
        torch.autograd.grad(first.sum(), leaves[0])
