"""The sampler update, forward noising and their gradients against the reference, and the bytes that they move."""

import math

import pytest
import torch
from helpers import DTYPES, FEW, HALVES, SEEDS, doubled, images, on_reference, with_reference
from hypothesis import given
from hypothesis import strategies as st
from operations import assert_no_worse, draw, error
from traffic import traffic, traffic_of

import kernels

SHAPES = st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 20), st.integers(1, 20))
CLIPS = st.sampled_from(["none", "number", "tensor", "step from number", "step from tensor"])


def coefficients(batch, count, device, dtype=torch.float32, seed=99):
    return list(draw(count, batch, seed=seed, dtype=dtype, device=device))


def clip_of(kind, batch, device):
    step_z, step_x, percentile = coefficients(batch, 3, device, seed=7)
    limit = 0.7 if "number" in kind else 0.5 + percentile.abs()
    if kind == "none":
        return None
    return kernels.Clip(limit, step_z, step_x) if kind.startswith("step") else limit


def gradients(output, inputs):
    inputs = [x for x in inputs if x is not None]
    direction = draw(*output.shape, seed=5, dtype=torch.float32, device=output.device).to(output.dtype)
    return torch.autograd.grad(output, inputs, direction, allow_unused=True)


@FEW
@given(
    shape=SHAPES,
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    layouts=st.tuples(*[st.booleans()] * 3),
    with_z=st.booleans(),
    with_b=st.booleans(),
    kind=CLIPS,
    with_noise=st.booleans(),
    out_dtype=st.sampled_from([None, *DTYPES]),
    seed=SEEDS,
)
def test_update_and_its_gradients(device, shape, dtypes, layouts, with_z, with_b, kind, with_noise, out_dtype, seed):
    z, a, b = images(shape, dtypes, device, layouts)
    b = b if with_b else None
    coef_z, coef_a, coef_b, coef_noise = coefficients(shape[0], 4, device, torch.float64)
    options = {
        "coef_z": coef_z if with_z else None,
        "coef_a": coef_a,
        "coef_b": coef_b if with_b else None,
        "clip": clip_of(kind, shape[0], device),
        "coef_noise": coef_noise if with_noise else None,
        "seed": seed,
        "sample_ids": torch.arange(shape[0], device=device) * 2**33,
        "step": 3,
    }
    result = kernels.affine_update(z, a, b, out_dtype=out_dtype, **options)
    expected = on_reference(kernels.affine_update, z, a, b, **options)
    assert result.dtype == (out_dtype or torch.float32)
    assert error(result, expected) < (1e-6 if result.dtype == torch.float32 else 1e-2)
    if result.dtype == torch.float32:
        for ours, theirs in zip(gradients(result, (z, a, b)), gradients(expected, (z, a, b)), strict=True):
            ours, theirs = (torch.zeros(()) if g is None else g for g in (ours, theirs))  # z may not take part
            assert error(ours, theirs) < (1e-5 if theirs.dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_inputs_lose_nothing_but_the_last_rounding(device, dtype):
    z, a, b = images((3, 3, 16, 16), (torch.float32, dtype, dtype), device)
    coefs = coefficients(3, 3, device)
    options = dict(zip(("coef_z", "coef_a", "coef_b"), coefs, strict=True))
    exact = on_reference(kernels.affine_update, *doubled(z, a, b), **{k: v.cpu() for k, v in options.items()})
    assert error(kernels.affine_update(z, a, b, **options), exact) < 1e-6
    eager = sum(c.to(dtype)[:, None, None, None] * x.to(dtype) for c, x in zip(coefs, (z, a, b), strict=True))
    ours = kernels.affine_update(z, a, b, out_dtype=dtype, **options)
    assert_no_worse([ours], [eager], [exact], factor=1)


def test_update_keeps_the_memory_order_of_z_and_takes_any_other(device):
    z, a, b = images((2, 3, 6, 5), (torch.float32,) * 3, device, (True, False, False))
    (coef,) = coefficients(2, 1, device)
    wide = torch.stack([b.detach(), b.detach()], dim=-1)[..., 0]  # neither contiguous nor channels-last
    result, expected = with_reference(kernels.affine_update, z, a, wide, coef_z=coef, coef_a=coef, coef_b=coef)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert error(result, expected) < 1e-6
    flat = (z.flatten(1), a.flatten(1))
    assert error(*with_reference(kernels.affine_update, *flat, coef_z=coef, coef_a=coef)) < 1e-6


def test_a_nan_survives_the_clip(device):
    z = torch.full((1, 1, 4, 4), torch.nan, device=device)
    one = torch.ones(1, device=device)
    assert kernels.affine_update(z, z.clone(), coef_z=one, coef_a=one, clip=1.0).isnan().all()


def test_float64_runs_the_reference(device):
    z, a = (draw(2, 3, 4, 4, seed=seed, dtype=torch.float64, device=device) for seed in (0, 1))
    (coef,) = coefficients(2, 1, device, torch.float64)
    assert torch.equal(*with_reference(kernels.affine_update, z, a, coef_z=coef, coef_a=coef))


def test_gradients_of_coefficients_are_the_references(device):
    z, a = images((2, 3, 4, 4), (torch.float32,) * 2, device)
    coef = coefficients(2, 1, device)[0].requires_grad_()
    ours, theirs = with_reference(kernels.affine_update, z, a, coef_z=coef, coef_a=coef)
    assert torch.equal(*gradients(ours, [coef]), *gradients(theirs, [coef]))


@FEW
@given(shape=SHAPES, dtype=st.sampled_from(DTYPES), channels_last=st.booleans(), seed=SEEDS)
def test_add_noise_and_its_gradient(device, shape, dtype, channels_last, seed):
    (x,) = images(shape, (dtype,), device, (channels_last,))
    angle = torch.linspace(0.1, 1.5, shape[0], device=device, dtype=torch.float64)
    key = {"seed": seed, "sample_ids": torch.arange(shape[0], device=device) + 2**40, "step": 9}
    (result, noise), (expected, same_noise) = with_reference(kernels.add_noise, x, angle, **key)
    torch.testing.assert_close(noise, same_noise, rtol=0, atol=2e-6)
    assert error(result, expected) < 1e-6
    assert error(*gradients(result, [x]), *gradients(expected, [x])) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("limit", [None, 0.5], ids=["plain", "clipped"])
@pytest.mark.parametrize("unguided", [False, True])
def test_the_steps_of_samplers(device, unguided, limit):
    z, v_cond, v_uncond = images((3, 3, 8, 8), (torch.float32, *[torch.bfloat16] * 2), device, (True,) * 3)
    v_uncond = None if unguided else v_uncond
    w = None if unguided else torch.tensor([0.0, 1.0, 4.0], device=device)
    start, far, end = torch.tensor([[1.4, 1.0, 0.5], [0.2, 0.6, 0.1], [0.9, 0.9, 0.4]], device=device)
    key = {"seed": 4, "sample_ids": torch.arange(3, device=device), "step": 2}
    steps = ((kernels.guided_step, (start, end), {}), (kernels.stochastic_step, (start, far, end), key))
    for step, angles, noise in steps:
        assert error(*with_reference(step, z, v_cond, v_uncond, w, *angles, clip=limit, **noise)) < 1e-6


# --- what moves ---


@pytest.mark.interpreter
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["none", "step from number"])
@pytest.mark.parametrize("with_noise", [False, True])
def test_update_reads_each_image_once_and_writes_one(device, channels_last, kind, with_noise):
    shape = (2, 3, 32, 32)
    z, a, b = images(shape, (torch.float32, torch.bfloat16, torch.bfloat16), device, (channels_last,) * 3)
    coef_z, coef_a, coef_b, coef_noise = coefficients(2, 4, device)
    options = {"coef_z": coef_z, "coef_a": coef_a, "coef_b": coef_b, "clip": clip_of(kind, 2, device)}
    if with_noise:
        options |= {"coef_noise": coef_noise, "seed": 1, "sample_ids": torch.arange(2)}
    with traffic() as seen, torch.no_grad():
        kernels.affine_update(z, a, b, out_dtype=torch.bfloat16, **options)
    floor = z.numel() * (4 + 2 + 2 + 2)
    assert seen.kernels == ["_update_kernel"]
    tiles = 2 * math.ceil(z[0].numel() / 504)
    assert 0 < seen.total() - floor <= (4 * 7 + 8) * tiles  # a tile's coefficients and sample id
    assert (seen.read["z"], seen.read["a"], seen.read["b"]) == (4 * z.numel(), 2 * z.numel(), 2 * z.numel())


@pytest.mark.interpreter
def test_forward_noising_reads_the_image_alone(device):
    x = draw(2, 3, 32, 32, device=device, channels_last=True)
    with traffic() as seen:
        kernels.add_noise(x, torch.ones(2), seed=1, sample_ids=torch.arange(2), step=0)
    assert seen.total() / (12 * x.numel()) == pytest.approx(1.00, abs=0.005)
    assert seen.read["x"] + seen.read["a"] == 4 * x.numel()


@pytest.mark.interpreter
@pytest.mark.parametrize(("clip", "images_read"), [(None, 1), (0.5, 3)])
def test_the_gradient_reads_images_only_under_a_clip(device, clip, images_read):
    z, a = images((2, 3, 32, 32), (torch.float32,) * 2, device)
    coef_z, coef_a = coefficients(2, 2, device)
    _, seen = traffic_of(lambda: kernels.affine_update(z, a, coef_z=coef_z, coef_a=coef_a, clip=clip), (z, a))
    assert seen.total() / (4 * z.numel() * (images_read + 2)) == pytest.approx(1.00, abs=0.005)


def noisy_step(z, a, coef, seed):
    key = {"seed": seed, "sample_ids": torch.arange(2, device=z.device)}
    z = kernels.affine_update(z, a, coef_z=coef, coef_a=coef, clip=0.5, coef_noise=coef, step=3, **key)
    return kernels.add_noise(z, coef, step=1, **key)[0]


def test_compiles_without_graph_breaks(device):
    z, a = images((2, 3, 4, 4), (torch.float32,) * 2, device)
    (coef,) = coefficients(2, 1, device)
    compiled = torch.compile(noisy_step, fullgraph=True, backend="aot_eager")
    for seed in (1, 2, 2**63 + 1):
        ours, plain = (f(z, a, coef, seed) for f in (compiled, noisy_step))
        assert torch.equal(ours, plain)
        for first, second in zip(gradients(ours, (z, a)), gradients(plain, (z, a)), strict=True):
            assert torch.equal(first, second)


def test_the_angle_of_a_rotation_survives_many_steps(device):
    """A full turn in the plane of (z, v), in 64 steps, comes back to where it began."""
    z, v = draw(1, 1, 4, 4, device=device), draw(1, 1, 4, 4, seed=1, device=device)
    step = torch.full((1,), 2 * math.pi / 64, dtype=torch.float64, device=device)
    image, velocity = z, v
    for _ in range(64):
        image, velocity = (
            kernels.affine_update(image, velocity, coef_z=step.cos(), coef_a=-step.sin()),
            kernels.affine_update(image, velocity, coef_z=step.sin(), coef_a=step.cos()),
        )
    assert error(image, z) < 1e-5
