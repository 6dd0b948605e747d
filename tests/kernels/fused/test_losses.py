"""The regression loss and SiD's generator loss, with their gradients, against the reference; bytes and registration."""

import pytest
import torch
from helpers import DTYPES, FEW, HALVES, SEEDS, doubled, draw, error, images, on_reference
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from traffic import traffic

import kernels
from kernels.fused.regression_loss import LONGEST

SHAPES = st.one_of(
    st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 20), st.integers(1, 20)),
    st.just((2, 3, 120, 111)),  # more than one program sums
)


def coefficients(batch, device, with_z=True, with_b=True, dtype=torch.float64):
    coef_z, coef_a, coef_b, weight = draw(4, batch, seed=99, dtype=dtype, device=device)
    return {
        "coef_z": coef_z if with_z else None,
        "coef_a": coef_a,
        "coef_b": coef_b if with_b else None,
        "weight": weight.abs(),
    }


def upstream(loss):
    return torch.linspace(0.5, 2, loss.shape[0], device=loss.device, dtype=loss.dtype)


@FEW
@given(
    shape=SHAPES,
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 4),
    layouts=st.tuples(*[st.booleans()] * 4),
    with_z=st.booleans(),
    with_b=st.booleans(),
    seed=SEEDS,
)
def test_regression_loss_and_its_gradient(device, shape, dtypes, layouts, with_z, with_b, seed):
    prediction, z, a, b = images(shape, dtypes, layouts, device, seed)
    b = b if with_b else None
    coefs = coefficients(shape[0], device, with_z, with_b)
    ours = kernels.affine_regression_loss(prediction, z, a, b, **coefs)
    exact_prediction, *others = doubled(prediction, z, a, b)
    coefs = {key: None if value is None else value.cpu() for key, value in coefs.items()}
    exact = on_reference(kernels.affine_regression_loss, exact_prediction, *others, **coefs)
    assert ours.dtype == torch.float32
    assert error(ours.cpu(), exact) < 1e-5
    (gradient,) = torch.autograd.grad(ours, prediction, upstream(ours))
    (exact_gradient,) = torch.autograd.grad(exact, exact_prediction, upstream(exact))
    assert gradient.dtype == prediction.dtype
    assert (
        error(gradient.cpu(), exact_gradient)
        < {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[prediction.dtype]
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_better_than_eager(device, dtype):
    """Against plain PyTorch that takes half-precision images as they are: the widened reference, and all in `dtype`."""
    prediction, z, a, b = images((4, 3, 32, 32), (dtype,) * 4, (False,) * 4, device)
    coefs = coefficients(4, device, dtype=torch.float32)

    def eager(p):
        c_z, c_a, c_b, weight = (value.to(p.dtype)[:, None, None, None] for value in coefs.values())
        return (weight * (c_z * z + c_a * a + c_b * b - p).square()).mean((1, 2, 3))

    exact_prediction, *others = doubled(prediction, z, a, b)
    exact = on_reference(
        kernels.affine_regression_loss, exact_prediction, *others, **{key: value.cpu() for key, value in coefs.items()}
    )
    (exact_gradient,) = torch.autograd.grad(exact, exact_prediction, upstream(exact))
    errors = []
    for loss in (kernels.affine_regression_loss(prediction, z, a, b, **coefs), eager(prediction)):
        (gradient,) = torch.autograd.grad(loss, prediction, upstream(loss))
        errors.append((error(loss.cpu(), exact), error(gradient.cpu(), exact_gradient)))
    (loss_error, gradient_error), (eager_loss_error, eager_gradient_error) = errors
    assert loss_error <= eager_loss_error
    assert gradient_error <= 1.5 * eager_gradient_error


def test_one_loss_needs_no_gradient(device):
    prediction, z, a, b = (x.detach() for x in images((2, 3, 8, 8), (torch.float32,) * 4, (False,) * 4, device))
    loss = kernels.affine_regression_loss(prediction, z, a, b, **coefficients(2, device))
    assert not loss.requires_grad
    with torch.no_grad():
        assert torch.equal(
            loss, kernels.affine_regression_loss(prediction.requires_grad_(), z, a, b, **coefficients(2, device))
        )


def test_the_graph_can_be_walked_twice(device):
    prediction, z, a, b = images((2, 3, 8, 8), (torch.float32,) * 4, (False,) * 4, device)
    loss = kernels.affine_regression_loss(prediction, z, a, b, **coefficients(2, device)).sum()
    (first,) = torch.autograd.grad(loss, prediction, retain_graph=True)
    (second,) = torch.autograd.grad(loss, prediction)
    assert torch.equal(first, second)


@FEW
@given(
    shape=SHAPES,
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    layouts=st.tuples(*[st.booleans()] * 3),
    alpha=st.floats(0.0, 2.0),
    scale=st.floats(0.01, 10),
    seed=SEEDS,
)
def test_sid_loss_and_its_gradients(device, shape, dtypes, layouts, alpha, scale, seed):
    inputs = [(scale * x.detach()).requires_grad_() for x in images(shape, dtypes, layouts, device, seed)]
    ours = kernels.sid_generator_loss(*inputs, alpha)
    theirs = on_reference(kernels.sid_generator_loss, *inputs, alpha)
    exact_inputs = doubled(*inputs)
    exact = on_reference(kernels.sid_generator_loss, *exact_inputs, alpha)
    # sums that cancel have no relative error to speak of: compare with the sum of what is added
    spread = exact.detach().abs().sum() + sum(x.detach().norm() for x in exact_inputs)
    assert (ours.cpu() - exact).abs().sum() <= 1e-5 * spread
    ours, theirs, exact = (
        torch.autograd.grad(loss, x, upstream(loss))
        for loss, x in ((ours, inputs), (theirs, inputs), (exact, exact_inputs))
    )
    for gradient, reference_gradient, exact_gradient, x in zip(ours, theirs, exact, inputs, strict=True):
        assert gradient.dtype == x.dtype
        assert error(gradient.cpu(), exact_gradient) <= 1.05 * error(reference_gradient.cpu(), exact_gradient) + 1e-5


def test_sid_loss_where_teacher_and_generator_agree(device):
    """ω stops at 1e-5, so nothing is divided by 0."""
    (x,) = images((2, 3, 8, 8), (torch.float32,), (False,), device)
    fake = draw(2, 3, 8, 8, seed=5, device=device)
    ours = kernels.sid_generator_loss(x, fake, x.detach().clone(), 1.2)
    assert error(ours, on_reference(kernels.sid_generator_loss, x, fake, x.detach().clone(), 1.2)) < 1e-5


def test_sid_gives_gradients_only_where_they_are_wanted(device):
    teacher, fake, generated = images((2, 3, 8, 8), (torch.float32,) * 3, (False,) * 3, device)
    loss = kernels.sid_generator_loss(teacher.detach(), fake, generated.detach(), 1.2)
    (gradient,) = torch.autograd.grad(loss, fake, upstream(loss))
    expected = on_reference(kernels.sid_generator_loss, teacher.detach(), fake, generated.detach(), 1.2)
    assert error(gradient, torch.autograd.grad(expected, fake, upstream(expected))[0]) < 1e-5


# --- what moves ---


@pytest.mark.interpreter
@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("form", ["teacher", "stage 1", "stage 2"])
def test_bytes_of_the_regression_loss(device, with_gradient, form):
    """Forward: each input once, and the residual once where a gradient is wanted; backward: residual and gradient."""
    dtypes = (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16)
    prediction, z, a, b = images((2, 3, 64, 64), dtypes, (True,) * 4, device)
    prediction = prediction.detach().requires_grad_(with_gradient)
    coefs = coefficients(2, device, with_z=form == "stage 2")
    with traffic() as forward:
        loss = kernels.affine_regression_loss(prediction, z, a, b, **coefs)
    n = prediction.numel()
    inputs = n * (2 + 2 + 2 + 4 * (form == "stage 2"))
    assert forward.read.total() / inputs == pytest.approx(1.00, abs=0.005)
    assert forward.total() / (inputs + 2 * n * with_gradient) == pytest.approx(1.00, abs=0.005)
    if with_gradient:
        with traffic() as backward:
            torch.autograd.grad(loss, prediction, upstream(loss))
        assert backward.total() / (4 * n) == pytest.approx(1.00, abs=0.005)
        recomputing = inputs + 2 * n  # what the backward pass would move without the residual
        assert 2 * n + backward.total() <= recomputing


@pytest.mark.interpreter
def test_bytes_of_the_sid_loss(device):
    inputs = images((2, 3, 64, 64), (torch.float32,) * 3, (True,) * 3, device)
    n = inputs[0].numel()
    with traffic() as forward:
        loss = kernels.sid_generator_loss(*inputs, 1.2)
    assert forward.total() / (3 * 4 * n) == pytest.approx(1.00, abs=0.005)
    with traffic() as backward:
        torch.autograd.grad(loss, inputs, upstream(loss))
    assert backward.total() / (6 * 4 * n) == pytest.approx(1.00, abs=0.005)


def test_a_long_sample_is_summed_by_several_programs(device):
    length = 3 * LONGEST + 5
    prediction, z = draw(2, length, device=device), draw(2, length, seed=1, device=device)
    one = torch.ones(2, device=device)
    loss = kernels.affine_regression_loss(prediction, z, z, None, coef_z=None, coef_a=one, coef_b=None, weight=one)
    assert error(loss, (z.double() - prediction.double()).square().mean(1)) < 1e-5


# --- registration ---

IMAGE = draw(2, 3, 4, 4)
OPERATIONS = {
    "affine_regression_loss": (IMAGE, IMAGE + 1, IMAGE - 1, None, draw(4, 2), True),
    "affine_regression_loss_backward": (IMAGE, draw(2), draw(4, 2)),
    "sid_generator_loss": (IMAGE, IMAGE + 1, IMAGE - 1, 1.2),
    "sid_generator_loss_backward": (draw(2), draw(2).abs(), IMAGE, IMAGE + 1, IMAGE - 1, 1.2, [True, False, True]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_opcheck(device, name):
    arguments = [x.to(device) if isinstance(x, torch.Tensor) else x for x in OPERATIONS[name]]
    opcheck(getattr(torch.ops.fastdiff, name).default, tuple(arguments))


def regression_loss(p, z, a, b, coefs):
    return kernels.affine_regression_loss(p, z, a, b, **coefs)


def sid_loss(p, z, a, b, coefs):
    return kernels.sid_generator_loss(p, z, a, 1.2)


@pytest.mark.parametrize("loss", [regression_loss, sid_loss])
def test_compiles_without_graph_breaks(device, loss):
    prediction, z, a, b = images((2, 3, 4, 4), (torch.float32,) * 4, (False,) * 4, device)
    coefs = coefficients(2, device)
    results = []
    for function in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):
        value = function(prediction, z, a, b, coefs)
        results.append((value, *torch.autograd.grad(value, prediction, upstream(value))))
    for compiled, plain in zip(*results, strict=True):
        assert torch.equal(compiled, plain)
