"""Half and double resolution: values, gradients, and what moves."""

import pytest
import torch
from addresses import assert_last_program_ends_with_its_tensors, launches
from helpers import DTYPES, FEW, SEEDS, doubled, on_reference, with_reference
from hypothesis import given
from hypothesis import strategies as st
from operations import draw, meta, worst
from torch.library import opcheck
from traffic import traffic, traffic_of

import kernels

each = pytest.mark.parametrize("function", [kernels.downsample, kernels.upsample])


def results(function, x):
    y = function(x)
    direction = draw(*y.shape, seed=9, dtype=torch.bfloat16, device=y.device).to(y.dtype)
    return y, *torch.autograd.grad(y, x, direction)


@FEW
@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from([1, 5, 16, 70, 96]),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    layout=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=SEEDS,
)
def test_resampling_and_its_gradients(device, batch, channels, height, width, layout, dtype, seed):
    shape = (batch, channels, 2 * height, 2 * width)
    x = draw(*shape, seed=seed, dtype=dtype, device=device, channels_last=layout).requires_grad_()
    for function in (kernels.downsample, kernels.upsample):
        y, dx = results(function, x)
        assert y.dtype == dx.dtype == dtype
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        assert worst([y, dx], on_reference(results, function, *doubled(x))) < 2 * torch.finfo(dtype).eps


@each
def test_corners(device, function):
    assert function(torch.zeros(0, 8, 4, 4, device=device)).shape[0] == 0
    assert torch.equal(*with_reference(function, draw(2, 8, 4, 4, dtype=torch.float64, device=device)))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@each
def test_images_move_once(device, function, dtype):
    x = draw(2, 64, 8, 8, dtype=dtype, device=device, channels_last=True).requires_grad_()
    with torch.no_grad():
        least = (x.numel() + function(x).numel()) * dtype.itemsize
    there, back = traffic_of(lambda: function(x), [x])
    assert there.total() == back.total() == least


@pytest.mark.interpreter
@each
def test_tiles_that_reach_beyond_the_image_touch_nothing_there(device, function):
    x = draw(3, 70, 10, 6, device=device, channels_last=True).requires_grad_()
    with traffic():
        found = results(function, x)
    assert worst(found, on_reference(results, function, *doubled(x))) < 1e-6


@pytest.mark.interpreter
@each
def test_offsets_have_64_bits(function):
    x = meta(131073, 256, 8, 8, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last).requires_grad_()

    def forward_and_backward():
        y = function(x)
        torch.autograd.grad(y, x, torch.empty_like(y))

    large = launches(forward_and_backward)
    assert len(large) == 2
    for one in large:
        assert_last_program_ends_with_its_tensors(one)


@each
def test_opcheck(device, function):
    x = draw(2, 24, 6, 8, device=device, channels_last=True)
    opcheck(getattr(torch.ops.fastdiff, function.__name__).default, (x, 0.25))
