"""Triton's interpreter is wrong in bfloat16; with the shim it is right, and without it the tests here would notice."""

import pytest
import torch
import triton
import triton.language as tl
from operations import draw, error
from traffic import OutOfRange, traffic

from kernels.fused.launch import launch

shim = pytest.importorskip("shim")
pytestmark = pytest.mark.interpreter


@triton.jit
def _product_kernel(out, a, b, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a + at), tl.load(b + at))
    tl.store(out + at, product)


@triton.jit
def _copy_kernel(out, x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < n)


def product(a, b):
    out = torch.empty(16, 16)
    launch(_product_kernel, (1,), out=out, a=a, b=b, SIZE=16)
    return out


def copied(x, dtype):
    out = torch.empty_like(x, dtype=dtype)
    launch(_copy_kernel, (1,), out=out, x=x, n=x.numel(), BLOCK=triton.next_power_of_2(x.numel()))
    return out


@pytest.fixture
def bare_interpreter():
    shim.uninstall()
    yield
    shim.install()


A, B = (draw(16, 16, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
VALUES = torch.cat(
    [draw(500) * 10.0 ** torch.arange(-5, 5).repeat(50), torch.tensor([0.0, -0.0, 1e-40, torch.inf, -torch.inf, 65504])]
)


def test_the_shim_makes_dot_and_rounding_right():
    assert error(product(A, B), A.double() @ B.double()) < 1e-6
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(copied(VALUES, dtype), VALUES.to(dtype))
        assert torch.equal(copied(VALUES.to(dtype), torch.float32), VALUES.to(dtype).float())
    assert copied(torch.full((16,), torch.nan), torch.bfloat16).isnan().all()


def test_the_shim_is_needed(bare_interpreter):
    assert not error(product(A, B), A.double() @ B.double()) < 1e-2
    assert not torch.equal(copied(VALUES, torch.bfloat16), VALUES.to(torch.bfloat16))


@pytest.mark.parametrize("beyond", [1, 7])
def test_an_access_out_of_range_is_caught_before_it_happens(beyond):
    x = torch.zeros(16)
    out = torch.zeros(16)
    with pytest.raises(Exception, match=r"OutOfRange.*_copy_kernel reads"), traffic():
        launch(_copy_kernel, (1,), out=out, x=x, n=16 + beyond, BLOCK=32)
    with pytest.raises(Exception, match=r"OutOfRange.*_copy_kernel writes"), traffic():
        launch(_copy_kernel, (1,), out=out[:-beyond], x=torch.zeros(16), n=16, BLOCK=16)
    assert issubclass(OutOfRange, AssertionError)


def test_traffic_counts_masked_bytes_by_argument():
    x = torch.zeros(13, dtype=torch.bfloat16)
    out = torch.zeros(13)
    with traffic() as seen:
        launch(_copy_kernel, (1,), out=out, x=x, n=13, BLOCK=16)
    assert (seen.read["x"], seen.written["out"], seen.total()) == (26, 52, 78)
    assert seen.kernels == ["_copy_kernel"]
