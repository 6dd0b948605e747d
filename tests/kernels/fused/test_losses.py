"""The regression loss and SiD's generator loss, with their gradients, against the reference; bytes."""

import pytest
import torch
from helpers import DTYPES, FEW, HALVES, SEEDS, doubled, images, on_reference, with_reference
from hypothesis import given
from hypothesis import strategies as st
from operations import assert_no_worse, draw, error
from traffic import traffic, traffic_of

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


def gradients(loss, inputs, **options):
    upstream = torch.linspace(0.5, 2, loss.shape[0], device=loss.device, dtype=loss.dtype)
    return torch.autograd.grad(loss, inputs, upstream, **options)


def exact_regression(images, coefs):
    """The loss and its gradient in float64, on the CPU."""
    prediction, *others = doubled(*images)
    coefs = {key: None if value is None else value.cpu() for key, value in coefs.items()}
    loss = on_reference(kernels.affine_regression_loss, prediction, *others, **coefs)
    return loss, *gradients(loss, prediction)


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
    prediction, z, a, b = images(shape, dtypes, device, layouts, seed)
    b = b if with_b else None
    coefs = coefficients(shape[0], device, with_z, with_b)
    ours = kernels.affine_regression_loss(prediction, z, a, b, **coefs)
    exact, exact_gradient = exact_regression((prediction, z, a, b), coefs)
    assert ours.dtype == torch.float32
    assert error(ours, exact) < 1e-5
    (gradient,) = gradients(ours, prediction)
    assert gradient.dtype == prediction.dtype
    limits = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
    assert error(gradient, exact_gradient) < limits[prediction.dtype]


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_better_than_eager(device, dtype):
    """Against plain PyTorch that takes half-precision images as they are: the widened reference, and all in `dtype`."""
    prediction, z, a, b = images((4, 3, 32, 32), (dtype,) * 4, device)
    coefs = coefficients(4, device, dtype=torch.float32)

    def eager(p):
        c_z, c_a, c_b, weight = (value.to(p.dtype)[:, None, None, None] for value in coefs.values())
        return (weight * (c_z * z + c_a * a + c_b * b - p).square()).mean((1, 2, 3))

    losses = (kernels.affine_regression_loss(prediction, z, a, b, **coefs), eager(prediction))
    (ours, our_gradient), (theirs, their_gradient) = ((loss, *gradients(loss, prediction)) for loss in losses)
    exact, exact_gradient = exact_regression((prediction, z, a, b), coefs)
    assert_no_worse([ours], [theirs], [exact], factor=1)
    assert_no_worse([our_gradient], [their_gradient], [exact_gradient])


def test_the_graph_can_be_walked_twice(device):
    prediction, z, a, b = images((2, 3, 8, 8), (torch.float32,) * 4, device)
    loss = kernels.affine_regression_loss(prediction, z, a, b, **coefficients(2, device))
    assert torch.equal(*gradients(loss, prediction, retain_graph=True), *gradients(loss, prediction))


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
    inputs = [(scale * x.detach()).requires_grad_() for x in images(shape, dtypes, device, layouts, seed)]
    ours, theirs = with_reference(kernels.sid_generator_loss, *inputs, alpha)
    exact_inputs = doubled(*inputs)
    exact = on_reference(kernels.sid_generator_loss, *exact_inputs, alpha)
    # sums that cancel have no relative error to speak of: compare with the sum of what is added
    spread = exact.detach().abs().sum() + sum(x.detach().norm() for x in exact_inputs)
    assert (ours.cpu() - exact).abs().sum() <= 1e-5 * spread
    ours, theirs, exact = gradients(ours, inputs), gradients(theirs, inputs), gradients(exact, exact_inputs)
    for gradient, reference_gradient, exact_gradient, x in zip(ours, theirs, exact, inputs, strict=True):
        assert gradient.dtype == x.dtype
        assert error(gradient, exact_gradient) <= 1.05 * error(reference_gradient, exact_gradient) + 1e-5


def test_sid_loss_where_teacher_and_generator_agree(device):
    """ω stops at 1e-5, so nothing is divided by 0."""
    x, fake = images((2, 3, 8, 8), (torch.float32,) * 2, device)
    assert error(*with_reference(kernels.sid_generator_loss, x, fake, x.detach().clone(), 1.2)) < 1e-5


def test_sid_gives_gradients_only_where_they_are_wanted(device):
    teacher, fake, generated = images((2, 3, 8, 8), (torch.float32,) * 3, device)
    ours, theirs = with_reference(kernels.sid_generator_loss, teacher.detach(), fake, generated.detach(), 1.2)
    assert error(*gradients(ours, fake), *gradients(theirs, fake)) < 1e-5


# --- what moves ---


@pytest.mark.interpreter
@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("form", ["teacher", "stage 1", "stage 2"])
def test_bytes_of_the_regression_loss(device, with_gradient, form):
    """Forward: each input once, and the residual once where a gradient is wanted; backward: residual and gradient."""
    dtypes = (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16)
    prediction, z, a, b = images((2, 3, 64, 64), dtypes, device, (True,) * 4)
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
            gradients(loss, prediction)
        assert backward.total() / (4 * n) == pytest.approx(1.00, abs=0.005)
        recomputing = inputs + 2 * n  # what the backward pass would move without the residual
        assert 2 * n + backward.total() <= recomputing


@pytest.mark.interpreter
def test_bytes_of_the_sid_loss(device):
    inputs = images((2, 3, 64, 64), (torch.float32,) * 3, device, (True,) * 3)
    n = inputs[0].numel()
    forward, backward = traffic_of(lambda: kernels.sid_generator_loss(*inputs, 1.2), inputs)
    assert forward.total() / (3 * 4 * n) == pytest.approx(1.00, abs=0.005)
    assert backward.total() / (6 * 4 * n) == pytest.approx(1.00, abs=0.005)


def test_a_long_sample_is_summed_by_several_programs(device):
    length = 3 * LONGEST + 5
    prediction, z = draw(2, length, device=device), draw(2, length, seed=1, device=device)
    one = torch.ones(2, device=device)
    loss = kernels.affine_regression_loss(prediction, z, z, None, coef_z=None, coef_a=one, coef_b=None, weight=one)
    assert error(loss, (z.double() - prediction.double()).square().mean(1)) < 1e-5
