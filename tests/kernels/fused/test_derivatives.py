"""What every operation does alike: as an operator, under `torch.func`, compiled, in autocast, without gradients."""

from contextlib import nullcontext

import pytest
import torch
from helpers import with_reference
from operations import NAMES, SHAPE, draw, error, operations
from torch.library import opcheck

import kernels


@pytest.fixture
def x(device):
    return draw(*SHAPE, seed=2, device=device)


def total(name, device):
    return lambda x: operations(device)[name](x).square().sum()


IMAGE, TABLE, IDS = draw(2, 3, 4, 4), draw(7, 2), torch.arange(2)
OPERATORS = {
    "affine_update": (IMAGE, IMAGE + 1, None, TABLE, True, True, 0.5, True, IDS, 3, 4, torch.bfloat16),
    "affine_update_backward": (
        *(IMAGE, IMAGE, IMAGE, None, TABLE, True, True, None, True),
        *(torch.float32, torch.bfloat16, None, [True, True, False]),
    ),
    "add_noise": (IMAGE, TABLE, IDS, 1, 2),
    "add_noise_backward": (IMAGE, TABLE, torch.bfloat16),
    "noise": ([2, 3], IDS, 1, 2, True),
    "affine_regression_loss": (IMAGE, IMAGE + 1, IMAGE - 1, None, draw(4, 2), True),
    "affine_regression_loss_backward": (IMAGE, draw(2), draw(4, 2)),
    "sid_generator_loss": (IMAGE, IMAGE + 1, IMAGE - 1, 1.2),
    "sid_generator_loss_backward": (draw(2), draw(2).abs(), IMAGE, IMAGE + 1, IMAGE - 1, 1.2, [True, False, True]),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_keep_their_promises(device, name):
    """Those of GroupNorm and attention have tests of their own."""
    arguments = [x.to(device) if isinstance(x, torch.Tensor) else x for x in OPERATORS[name]]
    opcheck(getattr(torch.ops.fastdiff, name).default, tuple(arguments))


@pytest.mark.parametrize("name", NAMES)
def test_the_functional_gradient_is_the_references(device, x, name):
    gradient = torch.func.grad(total(name, device))
    assert error(*with_reference(gradient, x)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_raises(device, x, name):
    with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
        torch.func.jvp(total(name, device), (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
        total(name, device)(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_raise_and_name_the_operation(device, x, name):
    others = {"downsample": "upsample", "upsample": "downsample", "residual_norm": "group_norm_backward"}
    gradient = others.get(name, f"{name}_backward")
    refusal = f"{gradient}: no second derivative"
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(total(name, device)(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=refusal):
        torch.autograd.grad(first.sum(), leaf)
    with pytest.raises(RuntimeError, match=refusal):
        torch.func.grad(lambda x: torch.func.grad(total(name, device))(x).sum())(x)


@pytest.mark.parametrize("name", NAMES)
def test_results_that_nobody_differentiates_need_no_graph(device, x, name):
    operation, leaf = operations(device)[name], x.clone().requires_grad_()
    plain, differentiable = operation(x), operation(leaf)
    with torch.no_grad():
        forgotten = operation(leaf)
    assert [y.requires_grad for y in (plain, forgotten, differentiable)] == [False, False, True]
    assert torch.equal(plain, forgotten)
    assert error(plain, differentiable) < 1e-6


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_it_gives_the_same(device, x, name, mode):
    torch.compiler.reset()
    operation = operations(device)[name]
    x.requires_grad_()
    with mode():
        ours, plain = (f(x) for f in (torch.compile(operation, fullgraph=True, backend="aot_eager"), operation))
    assert torch.equal(ours, plain)
    assert ours.requires_grad == plain.requires_grad == (mode is nullcontext)
    if ours.requires_grad:
        first, second = (torch.autograd.grad(out.square().sum(), x)[0] for out in (ours, plain))
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "attention"])
def test_autocast_changes_nothing_but_attention(device, x, name):
    plain = operations(device)[name](x)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(operations(device)[name](x), plain)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_gives_attention_its_dtype(device, backend):
    qkv = draw(2, 4, 24, device=device)
    with kernels.use(backend), torch.autocast(device, torch.bfloat16):
        ours = kernels.attention(qkv, 1)
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, kernels.attention(qkv.bfloat16(), 1))
        assert kernels.attention(qkv.half(), 1).dtype == torch.bfloat16
        assert kernels.attention(qkv.double(), 1).dtype == torch.float64
    assert kernels.attention(qkv, 1).dtype == torch.float32
