"""The algebra of one angle against the classical formulas with α and σ, written out here on their own."""

import math

import numpy as np
import pytest
import torch
from common import wide
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import rotation
from fastdiff.schedule import CosineSchedule, KarrasSchedule, LinearBetaSchedule

SCHEDULES = [CosineSchedule(), LinearBetaSchedule(), KarrasSchedule()]
every_schedule = pytest.mark.parametrize("sched", SCHEDULES, ids=lambda s: type(s).__name__)
STEPS = [2**power for power in range(14)]  # 1, 2, ..., 8192
inner_angles = st.floats(0.02, math.pi / 2 - 0.02)
seeds = st.integers(0, 2**32 - 1)


def images(seed, count, batch=3, shape=(2, 3, 3), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, batch, *shape, generator=generator, dtype=torch.float64).to(dtype)


def full(angle, batch=3):
    return torch.full((batch,), angle, dtype=torch.float64)


def angles_of(sched, index, steps, offset):
    """The student's and its teacher's angles a, m, e at a step, decoding (offset −1) or encoding (+1)."""
    a, m, e = (sched.angle((index + offset * part) / steps) for part in (0, 0.5, 1))
    return (a, m, torch.where(index == 1, 0.0, e)) if offset < 0 else (a, m, e)


# --- velocity, image and noise ---


@settings(max_examples=60, deadline=None)
@given(angle=inner_angles, seed=seeds)
def test_velocity_image_and_noise_are_inverse_to_each_other(angle, seed):
    z, v = images(seed, 2)
    phi = full(angle)
    x = rotation.x_from_velocity(z, v, phi)
    eps = rotation.eps_from_velocity(z, v, phi)
    torch.testing.assert_close(math.cos(angle) * x + math.sin(angle) * eps, z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(math.cos(angle) * eps - math.sin(angle) * x, v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rotation.velocity_from_x(z, x, phi), v, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(rotation.velocity_from_eps(z, eps, phi), v, rtol=1e-11, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(angle=inner_angles, seed=seeds)
def test_velocity_from_image_or_noise_gives_them_back(angle, seed):
    z, x = images(seed, 2)
    phi = full(angle)
    torch.testing.assert_close(
        rotation.x_from_velocity(z, rotation.velocity_from_x(z, x, phi), phi), x, rtol=1e-11, atol=1e-11
    )
    torch.testing.assert_close(
        rotation.eps_from_velocity(z, rotation.velocity_from_eps(z, x, phi), phi), x, rtol=1e-11, atol=1e-11
    )


@settings(max_examples=60, deadline=None)
@given(start=inner_angles, end=st.floats(0, math.pi / 2), seed=seeds)
def test_a_rotation_is_the_classical_ddim_step(start, end, seed):
    """[GD] eq. 4: z' = α'·x̂ + σ'·(z − α·x̂)/σ, down or up."""
    z, v = images(seed, 2)
    alpha, sigma = math.cos(start), math.sin(start)
    x = alpha * z - sigma * v
    expected = math.cos(end) * x + math.sin(end) * (z - alpha * x) / sigma
    torch.testing.assert_close(rotation.rotate(z, v, full(start - end)), expected, rtol=1e-11, atol=1e-11)
    c_z, c_x = rotation.ddim(full(start), full(end))
    torch.testing.assert_close(wide(c_z) * z + wide(c_x) * x, expected, rtol=1e-11, atol=1e-11)


def test_each_sample_has_its_own_angle():
    z, v = images(0, 2)
    delta = torch.tensor([0.1, -0.7, 1.3], dtype=torch.float64)
    together = rotation.rotate(z, v, delta)
    for row, angle in enumerate(delta.tolist()):
        torch.testing.assert_close(together[row], math.cos(angle) * z[row] - math.sin(angle) * v[row])


def test_tensors_keep_their_precision():
    delta = torch.tensor([0.3, 0.2, 0.1])
    for dtype in (torch.float32, torch.float64):
        z, v = images(0, 2, dtype=dtype)
        assert rotation.rotate(z, v, delta).dtype == dtype


def test_coefficients_are_float64_whatever_the_angles_are():
    high, middle, low = (torch.tensor([angle, angle / 2]) for angle in (1.2, 0.9, 0.4))
    results = [
        *rotation.two_step_target(high, middle, low),
        *rotation.ddim(high, low),
        *rotation.noise_back(low, high),
        *rotation.ancestral(high, low, 0.3),
        rotation.edm_input_scale(high),
        *(c for name in rotation.PARAMETERIZATIONS for c in rotation.velocity_coefficients(name, high)),
        *(rotation.loss_weight(name, high) for name in rotation.LOSS_WEIGHTS),
    ]
    assert [result.dtype for result in results] == [torch.float64] * len(results)
    assert all(result.shape == (2,) for result in results)


# --- the two-step target ---


def two_steps(z, v1, v2, a, m, e):
    """Where the teacher is after two steps, in float64 and in the classical form of [GD] eq. 4."""
    z, v1, v2, a, m, e = (wide(t.double()) if t.ndim == 1 else t.double() for t in (z, v1, v2, a, m, e))
    halfway = torch.cos(m) * (torch.cos(a) * z - torch.sin(a) * v1) + torch.sin(m) * (
        torch.sin(a) * z + torch.cos(a) * v1
    )
    x, eps = torch.cos(m) * halfway - torch.sin(m) * v2, torch.sin(m) * halfway + torch.cos(m) * v2
    return torch.cos(e) * x + torch.sin(e) * eps


def relative_error(value, expected):
    difference = (value.double() - expected).flatten(1).norm(dim=1)
    return (difference / expected.flatten(1).norm(dim=1)).max().item()


def check_two_step_target_in_float32(a, m, e, seed):
    z, v1, v2 = images(seed, 3, batch=len(a), shape=(1, 3, 4), dtype=torch.float32)
    c_z, c_1, c_2 = rotation.two_step_target(a, m, e)
    velocity = rotation.Affine(v1, c_z, c_1, v2, c_2).apply(z)
    assert velocity.dtype == torch.float32
    landing = two_steps(z, v1, v2, a, m, e)
    assert relative_error(rotation.rotate(z, velocity, a - e), landing) < 1e-5
    # A short step forgives an error of the velocity; what the student learns is the velocity itself.
    exact = (wide(torch.cos(a - e)) * z.double() - landing) / wide(torch.sin(a - e))
    assert relative_error(velocity, exact) < 1e-5


@every_schedule
@pytest.mark.parametrize("steps", STEPS)
def test_every_student_step_lands_where_two_teacher_steps_do_in_float32(sched, steps):
    index = torch.arange(1, steps + 1, dtype=torch.float64)
    a, m, e = angles_of(sched, index, steps, -1)
    assert e[0] == 0
    check_two_step_target_in_float32(a, m, e, seed=steps)


@every_schedule
@pytest.mark.parametrize("steps", STEPS)
def test_every_encoder_step_lands_where_two_teacher_steps_do_in_float32(sched, steps):
    index = torch.arange(steps, dtype=torch.float64)
    a, m, e = angles_of(sched, index, steps, +1)
    assert torch.all(e > m) and torch.all(m > a)
    check_two_step_target_in_float32(a, m, e, seed=steps)


@every_schedule
@pytest.mark.parametrize("steps", [2, 16, 1024])
def test_stochastic_steps_are_twice_as_long(sched, steps):
    index = torch.arange(2, steps + 1, dtype=torch.float64)
    a, m, e = (sched.angle((index - back) / steps) for back in (0, 1, 2))
    check_two_step_target_in_float32(a, m, torch.where(index == 2, 0.0, e), seed=steps)


@every_schedule
@pytest.mark.parametrize("steps", STEPS)
def test_the_last_stochastic_step_wants_the_teachers_first_velocity(sched, steps):
    a, zero = sched.angle(torch.tensor([1 / steps], dtype=torch.float64)), torch.zeros(1)
    c_z, c_1, c_2 = rotation.two_step_target(a, zero, zero)
    assert c_z.item() == 0
    assert c_2.item() == 0
    assert c_1.item() == pytest.approx(1, abs=1e-15)


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16, 32, 64])
def test_the_target_is_that_of_progressive_distillation(sched, steps):
    """[PD] algorithm 2: x̃ = (z'' − (σ''/σ)·z)/(α'' − (σ''/σ)·α), as a velocity (α·z − x̃)/σ."""
    index = torch.arange(1, steps + 1, dtype=torch.float64)
    a, m, e = angles_of(sched, index, steps, -1)
    z, v1, v2 = images(steps, 3, batch=steps)
    landing = two_steps(z, v1, v2, a, m, e)
    alpha, sigma, alpha_end, sigma_end = map(wide, (torch.cos(a), torch.sin(a), torch.cos(e), torch.sin(e)))
    x = (landing - sigma_end / sigma * z) / (alpha_end - sigma_end / sigma * alpha)
    c_z, c_1, c_2 = map(wide, rotation.two_step_target(a, m, e))
    target = c_z * z + c_1 * v1 + c_2 * v2
    torch.testing.assert_close(alpha * z - sigma * target, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(target, (alpha * z - x) / sigma, rtol=1e-7, atol=1e-7)


# --- noise ---


def posterior(start, end):
    """E and std of z_end given z_start and x, from the joint normal distribution of both given x.

    z_end = α_s·x + σ_s·ε, z_start = ρ·z_end + √(σ_t² − ρ²σ_s²)·ε' with ρ = α_t/α_s. Returns the mean's coefficients.
    """
    alpha_t, sigma_t, alpha_s, sigma_s = math.cos(start), math.sin(start), math.cos(end), math.sin(end)
    mix = np.array(
        [[sigma_s, 0], [alpha_t / alpha_s * sigma_s, math.sqrt(sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2)]]
    )
    covariance = mix @ mix.T  # of (z_end, z_start)
    gain = covariance[0, 1] / covariance[1, 1]
    return gain, alpha_s - gain * alpha_t, math.sqrt(np.linalg.det(covariance) / covariance[1, 1]), mix[1, 1]


@settings(max_examples=80, deadline=None)
@given(first=inner_angles, second=inner_angles)
def test_ancestral_is_the_gaussian_posterior(first, second):
    end, start = sorted((first, second))
    if start - end < 1e-3:
        return
    c_z, c_x, low = rotation.ancestral(full(start), full(end), 0.0)
    high = rotation.ancestral(full(start), full(end), 1.0)[2]
    gain, share, std, forward_std = posterior(start, end)
    assert c_z[0].item() == pytest.approx(gain, rel=1e-9)
    assert c_x[0].item() == pytest.approx(share, rel=1e-7)
    assert low[0].item() == pytest.approx(std, rel=1e-7)
    assert high[0].item() == pytest.approx(forward_std, rel=1e-7)
    between = rotation.ancestral(full(start), full(end), 0.3)[2][0].item()
    assert math.log(between) == pytest.approx(0.3 * math.log(forward_std) + 0.7 * math.log(std), abs=1e-7)


@pytest.mark.parametrize("variance", [0.0, 0.3, 1.0])
def test_ancestral_ends_at_the_image_without_noise(variance):
    start = torch.tensor([0.01, 0.8, math.pi / 2 - 1e-4], dtype=torch.float64)
    c_z, c_x, std = rotation.ancestral(start, torch.zeros(3), variance)
    assert c_z.tolist() == [0, 0, 0]
    assert c_x.tolist() == [1, 1, 1]
    assert std.tolist() == [0, 0, 0]


@settings(max_examples=80, deadline=None)
@given(first=st.floats(0, math.pi / 2 - 0.01), second=st.floats(0, math.pi / 2 - 0.01))
def test_noising_back_reaches_the_signal_and_the_noise_of_the_angle(first, second):
    """z_far = cos·x + sin·ε and a new ε' add up to signal cos(to) and noise variance sin²(to)."""
    far, to = sorted((first, second))
    keep, noise = (c[0].item() for c in rotation.noise_back(full(far), full(to)))
    assert keep * math.cos(far) == pytest.approx(math.cos(to), abs=1e-14)
    assert (keep * math.sin(far)) ** 2 + noise**2 == pytest.approx(math.sin(to) ** 2, abs=1e-14)
    assert noise >= 0


def test_noising_back_by_nothing_changes_nothing():
    keep, noise = rotation.noise_back(full(0.7), full(0.7))
    torch.testing.assert_close(keep, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(noise, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-8)


# --- parameterizations ---

WIDE_ANGLES = torch.tensor(
    [1e-3, 0.02, 0.3, math.pi / 4, 1.2, 1.5, math.atan(80), math.atan(math.exp(10)), math.pi / 2 - 1e-6],
    dtype=torch.float64,
)


def edm_denoised(output, z, angle):
    """[EDM] eq. 7 with its preconditioning, in its own variables: D = c_skip·x + c_out·F, σ_data = 0.5."""
    sigma, data = torch.tan(angle), 0.5
    c_skip = data**2 / (sigma**2 + data**2)
    c_out = sigma * data / (data**2 + sigma**2).sqrt()
    return wide(c_skip) * z / wide(torch.cos(angle)) + wide(c_out) * output


def test_edm_coefficients_are_its_preconditioning_up_to_pure_noise():
    z, output = images(1, 2, batch=len(WIDE_ANGLES))
    coef_z, coef_f = map(wide, rotation.velocity_coefficients("edm", WIDE_ANGLES))
    denoised = edm_denoised(output, z, WIDE_ANGLES)
    velocity = (wide(torch.cos(WIDE_ANGLES)) * z - denoised) / wide(torch.sin(WIDE_ANGLES))
    torch.testing.assert_close(coef_z * z + coef_f * output, velocity, rtol=1e-9, atol=1e-9)


def test_edm_coefficients_hold_at_pure_noise_itself():
    coef_z, coef_f = rotation.velocity_coefficients("edm", full(math.pi / 2, 1))
    assert coef_z.item() == pytest.approx(0, abs=1e-15)
    assert coef_f.item() == pytest.approx(-0.5, abs=1e-15)


def test_edm_input_scale_is_c_in():
    (z,) = images(2, 1, batch=len(WIDE_ANGLES))
    sigma = torch.tan(WIDE_ANGLES)
    scaled = wide(1 / (0.25 + sigma**2).sqrt()) * z / wide(torch.cos(WIDE_ANGLES))
    torch.testing.assert_close(wide(rotation.edm_input_scale(WIDE_ANGLES)) * z, scaled, rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(angle=inner_angles, seed=seeds)
def test_four_parameterizations_of_one_denoiser_agree(angle, seed):
    """From an image estimate x̂ and what follows from it: ε̂, v, and the F for which EDM's D is x̂."""
    z, x = images(seed, 2)
    alpha, sigma = math.cos(angle), math.sin(angle)
    eps = (z - alpha * x) / sigma
    velocity = alpha * eps - sigma * x
    edm_sigma = sigma / alpha
    c_skip, c_out = 0.25 / (edm_sigma**2 + 0.25), edm_sigma * 0.5 / math.sqrt(edm_sigma**2 + 0.25)
    outputs = {"v": velocity, "eps": eps, "x": x, "edm": (x - c_skip * z / alpha) / c_out}
    assert set(outputs) == set(rotation.PARAMETERIZATIONS)
    for name, output in outputs.items():
        coef_z, coef_f = map(wide, rotation.velocity_coefficients(name, full(angle)))
        torch.testing.assert_close(coef_z * z + coef_f * output, velocity, rtol=1e-8, atol=1e-8, msg=name)


@settings(max_examples=60, deadline=None)
@given(angle=st.floats(0, math.pi / 2), seed=seeds)
def test_two_outputs_are_merged_as_published(angle, seed):
    """x̂ = σ²·x̃ + α·(z − σ·ε̃) ([PD] section 4), whatever both are, up to the ends of the range."""
    z, eps, x = images(seed, 3)
    alpha, sigma = math.cos(angle), math.sin(angle)
    found = rotation.affine("eps-x", torch.cat([eps, x], dim=1), full(angle))
    expected = sigma**2 * x + alpha * (z - sigma * eps)
    torch.testing.assert_close(rotation.x_from_velocity(z, found.apply(z), full(angle)), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(angle=inner_angles, seed=seeds)
def test_loss_weights_turn_the_velocity_error_into_the_named_one(angle, seed):
    x, eps, x_hat = images(seed, 3)
    alpha, sigma = math.cos(angle), math.sin(angle)
    z = alpha * x + sigma * eps
    eps_hat = (z - alpha * x_hat) / sigma
    in_x, in_eps = (x - x_hat).square().flatten(1).mean(1), (eps - eps_hat).square().flatten(1).mean(1)
    error = ((alpha * eps - sigma * x) - (alpha * eps_hat - sigma * x_hat)).square().flatten(1).mean(1)
    # SNR·‖x − x̂‖² is the ε-error; +1 and max(·, 1) are [PD]'s two reweightings of it, and +1/σ_data² is [EDM]'s.
    snr = (alpha / sigma) ** 2
    expected = {
        "v": (snr + 1) * in_x,
        "snr": in_eps,
        "snr_trunc": max(snr, 1) * in_x,
        "constant": in_x,
        "edm": (snr + 4) * in_x,
    }
    assert set(expected) == set(rotation.LOSS_WEIGHTS)
    for name, value in expected.items():
        torch.testing.assert_close(
            rotation.loss_weight(name, full(angle)) * error, value, rtol=1e-8, atol=1e-10, msg=name
        )


def test_affine_adds_its_terms():
    z, a, b = images(5, 3)
    one, two, three = (torch.tensor([k, k + 0.5, -k], dtype=torch.float64) for k in (0.3, 1.1, 2.0))
    torch.testing.assert_close(rotation.Affine(a, one, two).apply(z), wide(one) * z + wide(two) * a)
    torch.testing.assert_close(
        rotation.Affine(a, one, two, b, three).apply(z), wide(one) * z + wide(two) * a + wide(three) * b
    )


def test_unknown_names_are_value_errors_that_list_the_known_ones():
    with pytest.raises(ValueError, match=r"score.*edm"):
        rotation.velocity_coefficients("score", full(0.5))
    with pytest.raises(ValueError, match=r"min-snr.*snr_trunc"):
        rotation.loss_weight("min-snr", full(0.5))
