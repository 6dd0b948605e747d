"""Every operation under `torch.func`: the gradient is the reference's, and what there is not raises."""

import pytest
import torch
from helpers import draw, error, on_reference

import kernels

ONE = torch.ones(2)
IMAGE = draw(2, 8, 4, 4, seed=1)
KEY = {"seed": 1, "sample_ids": torch.arange(2), "step": 2}
OPERATIONS = {
    "affine_update": lambda x: kernels.affine_update(x, IMAGE, coef_z=ONE, coef_a=ONE, clip=0.5),
    "add_noise": lambda x: kernels.add_noise(x, ONE, **KEY)[0],
    "affine_regression_loss": lambda x: kernels.affine_regression_loss(
        x, IMAGE, IMAGE.cos(), None, coef_z=ONE, coef_a=ONE, coef_b=None, weight=ONE
    ),
    "sid_generator_loss": lambda x: kernels.sid_generator_loss(x, IMAGE, IMAGE.cos(), 1.2),
    "group_norm": lambda x: kernels.group_norm(x, 2, torch.ones(8), torch.ones(8), silu=True),
    "attention": lambda x: kernels.attention(x.reshape(2, 4, 32)[..., :24], 1),
}
X = draw(2, 8, 4, 4, seed=2)
pytestmark = pytest.mark.interpreter  # on CPU tensors


def total(name):
    return lambda x: OPERATIONS[name](x).square().sum()


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_functional_gradient_is_the_references(name):
    ours = torch.func.grad(total(name))(X)
    assert error(ours, on_reference(torch.func.grad(total(name)), X)) < 1e-5


@pytest.mark.parametrize("name", OPERATIONS)
def test_forward_mode_raises(name):
    with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
        torch.func.jvp(total(name), (X,), (X,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
        total(name)(torch.autograd.forward_ad.make_dual(X, X))


@pytest.mark.parametrize("name", OPERATIONS)
def test_second_derivatives_raise_and_name_the_operation(name):
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(total(name)(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.sum(), x)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda x: torch.func.grad(total(name))(x).sum())(X)


@pytest.mark.parametrize("name", OPERATIONS)
def test_results_that_nobody_differentiates_need_no_graph(name):
    assert not OPERATIONS[name](X).requires_grad
    with torch.no_grad():
        assert not OPERATIONS[name](X.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "attention"])
def test_autocast_changes_nothing_but_attention(name):
    plain = OPERATIONS[name](X)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(OPERATIONS[name](X), plain)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_gives_attention_its_dtype(backend):
    qkv = draw(2, 4, 24)
    with kernels.use(backend), torch.autocast("cpu", torch.bfloat16):
        ours = kernels.attention(qkv, 1)
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, kernels.attention(qkv.bfloat16(), 1))
        assert kernels.attention(qkv.half(), 1).dtype == torch.bfloat16
        assert kernels.attention(qkv.double(), 1).dtype == torch.float64
    assert kernels.attention(qkv, 1).dtype == torch.float32
