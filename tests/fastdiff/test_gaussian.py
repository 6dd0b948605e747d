"""Samplers and distillation losses on Gaussian data, where all that they compute is known in closed form.

A pixel is x ~ N(m, s²), so z = cos φ·x + sin φ·ε is (s·cos φ, sin φ)·(u, ε) about cos φ·m, with u and ε standard
normal: noisy images at two angles are jointly normal, and their covariance is the inner product of two such vectors.
The exact denoiser is linear, every step of a sampler affine, and guidance moves m alone. What follows is derived from
this, and from the definitions of the algorithms; nothing is taken from `fastdiff.rotation`.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from common import wide
from torch import nn

import kernels
from fastdiff import samplers, streams
from fastdiff.denoiser import Denoiser, DenoiserConfig, Guided
from fastdiff.losses import regression
from fastdiff.losses.batch import Batch
from fastdiff.schedule import CosineSchedule, KarrasSchedule, LinearBetaSchedule
from fastdiff.unet import UNetConfig

MEAN, STD = 0.3, 0.5
COSINE = CosineSchedule()
SCHEDULES = [COSINE, LinearBetaSchedule(), KarrasSchedule()]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
sin, cos = np.sin, np.cos


def covariance(a, b, std=STD):
    """Of noisy pixels at two angles with the same x and ε."""
    return std**2 * cos(a) * cos(b) + sin(a) * sin(b)


def gain(a, b, std=STD):
    """Of a DDIM step, z' = cos b·x̂ + sin b·ε̂ = E[z_b | z_a]: the slope of a regression."""
    return covariance(a, b, std) / covariance(a, a, std)


def image(z, angle, mean=MEAN, std=STD):
    """E[x | z]."""
    return mean + gain(angle, 0.0, std) * (z - cos(angle) * mean)


def exact(mean=MEAN, std=STD):
    """The model whose velocity is E[v | z], from x̂ and ε̂ = (z − cos φ·x̂)/sin φ; all of a batch at one angle."""

    def model(z, angle, label, guidance):
        (phi,) = set(angle.tolist())
        model.angles.append(phi)
        x = image(z, phi, mean, std)
        return cos(phi) * (z - cos(phi) * x) / sin(phi) - sin(phi) * x

    model.angles = []
    return model


def grid(schedule, steps):
    """φ(0), φ(1/N), ..., φ(1) with 0 for φ(0): where samplers end."""
    return [0.0, *(schedule.angle(i / steps) for i in range(1, steps + 1))]


def stream(shape, step, seed=0, first=0):
    ids = torch.arange(first, first + shape[0])
    return kernels.randn(shape, seed=seed, sample_ids=ids, step=step, device="cpu").double()


# --- What a sampler does to its noise: with an affine model, one number for each of its streams --------------------


def response(sampler, model, steps, schedule=COSINE, at=1, **options):
    """(mean, gains): the pixel after step `at` as mean + Σ gains·noise, over the noise of the start, step N, ..., at.

    Measured by linear regression, without sampling error; that nothing is left over means that this is all there is.
    """
    shape, seen = (4, 1, 16, 16), {}
    start = stream(shape, 0)
    sampler(model, start, None, None, steps, schedule=schedule, on_step=seen.__setitem__, **options)
    noise = [stream(shape, i) for i in range(steps, max(at, 2) - 1, -1)]
    causes = torch.stack([torch.ones_like(start), start, *noise], -1).flatten(0, -2)
    effect = seen[at].flatten()
    found = torch.linalg.lstsq(causes, effect).solution
    torch.testing.assert_close(causes @ found, effect, rtol=0, atol=1e-10)
    return found[0].item(), found[1:].numpy()


def stochastic_law(schedule, steps, std=STD, step_gain=gain):
    """(mean, gains) of the sampler's images: each step goes from i to i − 2 and is noised back up to i − 1.

    Noising from angle f to m takes z_m = (cos m/cos f)·z_f + noise, with what is missing from the variance sin²m.
    """
    phi = grid(schedule, steps)
    mean, gains = -cos(phi[steps]) * MEAN, np.ones(1)  # of z − cos φ·MEAN
    for i in range(steps, 1, -1):
        far, middle = phi[i - 2], phi[i - 1]
        keep = cos(middle) / cos(far)
        step = keep * (gain(phi[i], far, std) if step_gain is gain else step_gain(phi[i], middle, far))
        mean, gains = step * mean, np.append(step * gains, math.sqrt(sin(middle) ** 2 - (keep * sin(far)) ** 2))
    last = gain(phi[1], 0.0, std)
    return MEAN + last * mean, last * gains


def ancestral_law(schedule, steps, gamma, std=STD):
    """(mean, gains) of DDPM's images: draws from q(z_s | z_t, x̂).

    By conditioning: z_s is N(cos s·x, sin²s) before z_t = ρ·z_s + noise is seen. The upper bound is the variance of
    that noise, the lower the posterior's.
    """
    phi = grid(schedule, steps)
    mean, gains = -cos(phi[steps]) * MEAN, np.ones(1)
    for t, s in pairwise(reversed(phi[1:])):
        rho = cos(t) / cos(s)
        upper = sin(t) ** 2 - (rho * sin(s)) ** 2
        weight = rho * sin(s) ** 2 / ((rho * sin(s)) ** 2 + upper)
        lower = (1 - weight * rho) * sin(s) ** 2
        step = weight + (1 - weight * rho) * cos(s) * gain(t, 0.0, std)
        mean, gains = step * mean, np.append(step * gains, math.sqrt(upper**gamma * lower ** (1 - gamma)))
    last = gain(phi[1], 0.0, std)
    return MEAN + last * mean, last * gains


def assert_law(found, expected):
    assert found[0] == pytest.approx(expected[0], abs=1e-9)
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-9)


def std_of(law):
    return float(np.linalg.norm(law[1]))


# --- stochastic ---------------------------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 3, 16, 128])
def test_stochastic_sampler_responds_to_each_noise_as_the_recursion_says(steps, schedule):
    """So each step has its own stream, and its own alone."""
    assert_law(response(samplers.stochastic, exact(), steps, schedule), stochastic_law(schedule, steps))


@pytest.mark.parametrize("steps, std", [(1, 1.135e-5), (2, 0.2), (16, 0.399), (128, 0.485)])
def test_stochastic_samples_have_the_known_deviation(steps, std):
    """Two steps by hand: the first gives x̂ = m, noised to 45°; the second's slope is ⅛/⅝, times sin 45°/cos 45°."""
    assert std_of(stochastic_law(COSINE, steps)) == pytest.approx(std, rel=2e-3)
    assert std_of(response(samplers.stochastic, exact(), steps)) == pytest.approx(std, rel=2e-3)


@pytest.mark.parametrize("steps", [1, 2, 3, 16, 128])
def test_stochastic_samples_have_mean_and_deviation_of_the_recursion(steps):
    """Within four standard errors: no stream, pixel or image may depend on another."""
    images = samplers.stochastic(exact(), stream((1024, 1, 8, 8), 0), None, None, steps, schedule=COSINE)
    mean, std = stochastic_law(COSINE, steps)[0], std_of(stochastic_law(COSINE, steps))
    count = images.numel()
    assert images.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(count))
    assert images.std().item() == pytest.approx(std, abs=4 * std / math.sqrt(2 * count))


def slope(steps, errors):
    return np.polyfit(np.log(steps), np.log(errors), 1)[0]


def test_stochastic_deviation_converges_to_the_truth_at_first_order():
    steps = (64, 128, 256)
    errors = [STD - std_of(response(samplers.stochastic, exact(), n)) for n in steps]
    assert slope(steps, errors) == pytest.approx(-1, abs=0.04), errors


def test_stochastic_steps_are_defined_with_a_clipped_image():
    """Each step written out in x̂ and ε̂."""
    steps, phi, limit = 5, grid(COSINE, 5), 0.4
    start = z = stream((3, 1, 4, 4), 0, seed=7)
    for i in range(steps, 0, -1):
        far, middle = phi[max(i - 2, 0)], phi[i - 1]
        x = image(z, phi[i]).clamp(-limit, limit)
        z = cos(far) * x + sin(far) * (z - cos(phi[i]) * x) / sin(phi[i])
        if i > 1:
            keep = cos(middle) / cos(far)
            z = keep * z + math.sqrt(sin(middle) ** 2 - (keep * sin(far)) ** 2) * stream(z.shape, i, seed=7)
    found = samplers.stochastic(exact(), start, None, None, steps, schedule=COSINE, clip=limit, seed=7)
    torch.testing.assert_close(found, z, rtol=1e-10, atol=1e-10)
    free = samplers.stochastic(exact(), start, None, None, steps, schedule=COSINE, seed=7)
    assert found.abs().max() <= limit < free.abs().max()


# --- ancestral ----------------------------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 32])
def test_ancestral_sampler_responds_to_each_noise_as_the_recursion_says(steps, gamma, schedule):
    found = response(samplers.ancestral, exact(), steps, schedule, variance=gamma)
    assert_law(found, ancestral_law(schedule, steps, gamma))


def test_ancestral_variance_is_that_of_guided_models_by_default():
    assert_law(response(samplers.ancestral, exact(), 4), ancestral_law(COSINE, 4, 0.3))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_ancestral_samples_have_mean_and_deviation_of_the_recursion(gamma):
    start = stream((1024, 1, 8, 8), 0)
    images = samplers.ancestral(exact(), start, None, None, 16, schedule=COSINE, variance=gamma)
    mean, std = ancestral_law(COSINE, 16, gamma)[0], std_of(ancestral_law(COSINE, 16, gamma))
    assert images.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(images.numel()))
    assert images.std().item() == pytest.approx(std, abs=4 * std / math.sqrt(2 * images.numel()))


@pytest.mark.parametrize("steps", [2, 3, 16])
def test_upper_variance_is_exact_for_data_of_deviation_one(steps):
    """z keeps the deviation 1 at every angle, however long the steps are: all of them are draws from p(z_s | z_t)."""
    for at in range(steps, 1, -1):
        law = response(samplers.ancestral, exact(std=1.0), steps, at=at, variance=1.0)
        assert std_of(law) == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("steps", [2, 3, 16])
def test_lower_variance_is_exact_for_data_that_are_one_point(steps):
    for at in range(steps, 1, -1):
        law = response(samplers.ancestral, exact(std=0.0), steps, at=at, variance=0.0)
        assert std_of(law) == pytest.approx(sin(COSINE.angle((at - 1) / steps)), abs=1e-8)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clip", [None, 0.4])
def test_last_ancestral_step_returns_the_expected_image(clip, gamma):
    seen = {}
    images = samplers.ancestral(
        exact(),
        stream((3, 1, 4, 4), 0),
        None,
        None,
        4,
        schedule=COSINE,
        variance=gamma,
        clip=clip,
        on_step=seen.__setitem__,
    )
    expected = image(seen[2], COSINE.angle(1 / 4))
    torch.testing.assert_close(images, expected if clip is None else expected.clamp(-clip, clip), rtol=0, atol=1e-10)


@pytest.mark.parametrize("gamma", [-0.01, 1.01, math.nan, math.inf])
def test_ancestral_variance_outside_its_bounds_is_a_value_error(gamma):
    with pytest.raises(ValueError, match=str(gamma)):
        samplers.ancestral(exact(), stream((1, 1, 2, 2), 0), None, None, 2, schedule=COSINE, variance=gamma)


# --- what samplers with noise share -------------------------------------------------------------------------------

noisy = pytest.mark.parametrize("sampler", [samplers.stochastic, samplers.ancestral], ids=lambda f: f.__name__)


def drawn(sampler, rows=slice(None), seed=0, steps=4):
    ids = torch.tensor([5, 900, 2, 2**40, 17])
    start = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return sampler(exact(), start[rows], None, None, steps, schedule=COSINE, seed=seed, sample_ids=ids[rows])


@noisy
def test_noise_of_an_image_depends_on_its_id_and_the_seed_alone(sampler):
    whole = drawn(sampler)
    for rows in ([0], [3, 1], [4, 2, 0]):
        torch.testing.assert_close(drawn(sampler, rows), whole[rows], rtol=1e-13, atol=1e-13)
    assert torch.equal(drawn(sampler), whole)
    assert ((drawn(sampler, seed=1) - whole).abs().amax((1, 2, 3)) > 1e-2).all()


@noisy
def test_ids_count_from_zero_by_default(sampler):
    start = stream((3, 1, 4, 4), 0)
    given, default = (
        sampler(exact(), start, None, None, 4, schedule=COSINE, seed=3, **ids)
        for ids in ({"sample_ids": torch.arange(3)}, {})
    )
    assert torch.equal(given, default)


@noisy
def test_one_step_has_no_noise(sampler):
    assert torch.equal(drawn(sampler, seed=0, steps=1), drawn(sampler, seed=1, steps=1))


@noisy
@pytest.mark.parametrize("steps", [1, 2, 3, 16])
def test_every_step_is_one_call_at_its_angle_and_is_reported(sampler, steps):
    model, reported = exact(), []
    images = sampler(
        model,
        stream((2, 1, 4, 4), 0),
        None,
        None,
        steps,
        schedule=COSINE,
        on_step=lambda i, z: reported.append((i, z)),
    )
    assert model.angles == [COSINE.angle(i / steps) for i in range(steps, 0, -1)]
    assert [i for i, _ in reported] == list(range(steps, 0, -1))
    assert torch.equal(reported[-1][1], images)


@pytest.mark.parametrize("sampler", [samplers.stochastic, samplers.ancestral, samplers.encode])
@pytest.mark.parametrize("steps", [0, -1])
def test_less_than_one_step_is_a_value_error(sampler, steps):
    with pytest.raises(ValueError, match=str(steps)):
        sampler(exact(), stream((1, 1, 2, 2), 0), None, None, steps, schedule=COSINE)


# --- encode -------------------------------------------------------------------------------------------------------


def images_of_data(count=4):
    return MEAN + STD * stream((count, 1, 8, 8), 0)


def up(schedule, steps):
    """φ(0), φ(1/N), ..., φ(1): an encoder takes images as z at φ(0), which is not 0."""
    return [schedule.angle(i / steps) for i in range(steps + 1)]


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 3, 16, 128])
def test_encoder_stretches_by_the_product_of_its_gains(steps, schedule):
    """Every step is reported, counted from 1, and takes one call."""
    x, phi, model, reported = images_of_data(), up(schedule, steps), exact(), []
    found = samplers.encode(
        model, x, None, None, steps, schedule=schedule, on_step=lambda i, z: reported.append((i, z))
    )
    assert [i for i, _ in reported] == list(range(1, steps + 1))
    assert torch.equal(reported[-1][1], found)
    assert model.angles == phi[:-1]
    gains = np.cumprod([gain(a, b) for a, b in pairwise(phi)])
    for (_, z), angle, total in zip(reported, phi[1:], gains, strict=True):
        expected = cos(angle) * MEAN + total * (x - cos(phi[0]) * MEAN)
        torch.testing.assert_close(z, expected, rtol=1e-10, atol=1e-10)


@every_schedule
def test_encoder_takes_data_to_the_deviation_of_noise_at_first_order(schedule):
    """The exact flow gives √(s²·cos²φ + sin²φ)."""
    x, steps = images_of_data(), (128, 256, 512)
    top, bottom = schedule.angle(1.0), schedule.angle(0.0)
    flow = math.sqrt(covariance(top, top) / covariance(bottom, bottom))
    errors = []
    for n in steps:
        z = samplers.encode(exact(), x, None, None, n, schedule=schedule)
        errors.append(flow - (z.std() / x.std()).item())
    assert min(errors) > 0  # E[z'|z] is never wider than z', by Cauchy and Schwarz
    assert slope(steps, errors) == pytest.approx(-1, abs=0.05), errors


@every_schedule
def test_decoding_an_encoded_image_returns_it_at_first_order(schedule):
    """Up from φ(0), down to 0: in the limit the flow from φ(0) to 0 is left, a thousandth at most."""
    x, steps, bottom = images_of_data(), (128, 256, 512), schedule.angle(0.0)
    limit = MEAN + (x - cos(bottom) * MEAN) * STD / math.sqrt(covariance(bottom, bottom))
    torch.testing.assert_close(limit, x, rtol=0, atol=1e-3)
    errors = []
    for n in steps:
        z = samplers.encode(exact(), x, None, None, n, schedule=schedule)
        errors.append((samplers.ddim(exact(), z, None, None, n, schedule=schedule) - limit).abs().max().item())
    assert slope(steps, errors) == pytest.approx(-1, abs=0.05), errors
    assert errors[-1] < 0.1


CLASSES = 3
MEANS = torch.tensor([0.3, -0.6, 0.1, -0.2], dtype=torch.float64)  # of the classes, the null class the last


class ExactNetwork(nn.Module):
    """What a perfect network puts out; the angle is the one of `angles` whose time it was given, to float32."""

    def __init__(self, parameterization, angles, means=MEANS):
        super().__init__()
        self.parameterization, self.means = parameterization, means
        self.angles = torch.tensor(sorted(angles), dtype=torch.float64)
        self.times = torch.log(torch.tan(self.angles)) / 4 if parameterization == "edm" else self.angles * 2 / math.pi
        self.asked = []

    def forward(self, z, time, label, guidance):
        distance, nearest = (time.double()[:, None] - self.times).abs().min(1)
        assert distance.max() < 1e-6
        phi = self.angles[nearest].numpy()
        mean = wide(self.means[-1] if label is None else self.means[label])
        self.asked.append(self.angles[nearest])
        if self.parameterization == "edm":  # its input is (x + σ·n)/√(σ² + σ_d²), its output (D − c_skip·x)/c_out
            sigma = np.tan(phi)
            noised = z * wide(np.sqrt(sigma**2 + 0.25))
            c_skip, c_out = wide(0.25 / (sigma**2 + 0.25)), wide(sigma * 0.5 / np.sqrt(sigma**2 + 0.25))
            denoised = mean + wide(STD**2 / (STD**2 + sigma**2)) * (noised - mean)
            return (denoised - c_skip * noised) / c_out
        y = z - wide(cos(phi)) * mean
        x = mean + wide(gain(phi, 0.0)) * y
        eps = wide(gain(phi, math.pi / 2)) * y
        return {"x": x, "eps": eps, "v": wide(cos(phi)) * eps - wide(sin(phi)) * x}[self.parameterization]


def denoiser(network, schedule=COSINE, parameterization="v", classes=CLASSES, size=(4, 4)):
    config = DenoiserConfig(UNetConfig(size, 1, classes), schedule, parameterization)
    return Denoiser(config, network)


@every_schedule
@pytest.mark.parametrize("parameterization", ["v", "eps", "x", "edm"])
@pytest.mark.parametrize("steps", [1, 5, 64])
def test_encoder_asks_every_network_only_where_its_velocity_is_defined(steps, parameterization, schedule):
    """x̂ has no velocity at 0, and ε̂ none at 90°."""
    phi = up(schedule, steps)
    network = ExactNetwork(parameterization, phi[:-1], MEANS[:1])
    x = images_of_data()
    model = denoiser(network, schedule, parameterization, classes=0)
    found = samplers.encode(model, x, None, None, steps, schedule=schedule)
    asked = torch.stack(network.asked)[:, 0]
    assert asked.tolist() == phi[:-1] and phi[0] > 1e-5 and phi[-2] < math.pi / 2 - 1e-5
    total = math.prod(gain(a, b) for a, b in pairwise(phi))
    expected = cos(phi[-1]) * MEAN + total * (x - cos(phi[0]) * MEAN)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


# --- What a student learns ----------------------------------------------------------------------------------------

RANGE = (0.0, 4.0)


class Recorded(nn.Module):
    """A student's network that puts out what it was given and keeps what it was asked."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, z, time, label, guidance):
        self.z, self.time, self.label, self.w = z, time, label, guidance
        return self.output


class Teacher:
    """The exact guided model: (1 + w)·v_c − w·v_0 is the velocity of the same Gaussian about (1 + w)·m_c − w·m_0."""

    def __init__(self):
        self.angles, self.strengths = [], []

    def __call__(self, z, angle, label, w):
        self.angles.append(angle)
        self.strengths.append(w)
        phi, mean = angle.numpy(), guided_mean(label, w)
        y = z - wide(cos(phi)) * mean
        return wide(gain(phi, phi + math.pi / 2)) * y - wide(sin(phi)) * mean  # v at φ is z at φ + 90°


def guided_mean(label, w):
    w = torch.zeros(len(label)) if w is None else w
    return wide((1 + w.double()) * MEANS[label] - w.double() * MEANS[-1])


@pytest.mark.parametrize("w", [0.0, 1.5, torch.tensor([0.0, 0.5, 2.0, 4.0])], ids=["none", "number", "each its own"])
@pytest.mark.parametrize("parameterization", ["v", "eps", "edm"])
@pytest.mark.parametrize(
    "sampler", [samplers.stochastic, samplers.ancestral, samplers.encode], ids=lambda f: f.__name__
)
def test_guided_network_samples_as_the_gaussian_about_the_guided_mean(sampler, parameterization, w):
    """From both raw outputs, without their combination being made."""
    start, label, steps = stream((4, 1, 4, 4), 0), torch.tensor([0, 2, 1, 1]), 3
    guided = Guided(denoiser(ExactNetwork(parameterization, up(COSINE, steps)), parameterization=parameterization))
    for options in ({},) if sampler is samplers.encode else ({}, {"clip": 0.4}):
        found = sampler(guided, start, label, w, steps, schedule=COSINE, **options)
        expected = sampler(Teacher(), start, label, w, steps, schedule=COSINE, **options)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
        assert not torch.allclose(found, sampler(Teacher(), start, label, 3.0, steps, schedule=COSINE, **options))


def batch(size=64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 1, 4, 4, generator=generator, dtype=torch.float64)
    return Batch(x, torch.randint(CLASSES, (size,), generator=generator), torch.arange(50, 50 + size), seed)


def step_ddim(z, a, b, mean):
    """cos b·x̂ + sin b·ε̂ of Gaussian data, where the exact step is known."""
    return wide(cos(b)) * mean + wide(gain(a, b)) * (z - wide(cos(a)) * mean)


def landing_velocity(z, a, landing, e):
    """v at (z, a) of the one pair (x, ε) with z = cos a·x + sin a·ε and landing = cos e·x + sin e·ε."""
    determinant = cos(a) * sin(e) - sin(a) * cos(e)
    x = (wide(sin(e)) * z - wide(sin(a)) * landing) / wide(determinant)
    eps = (wide(cos(a)) * landing - wide(cos(e)) * z) / wide(determinant)
    return wide(cos(a)) * eps - wide(sin(a)) * x


def truncated_snr_loss(target, prediction, a):
    """The larger of the errors of x̂ and ε̂, which are sin a and cos a times the velocity's."""
    error = (target - prediction).square().mean((1, 2, 3))
    return torch.from_numpy(np.maximum(sin(a) ** 2, cos(a) ** 2)) * error


def recorded_student(schedule, output):
    network = Recorded(output)
    return denoiser(network, schedule), network


def asked_index(network, schedule, candidates, steps):
    """i of the times φ(i/N)·2/π that the student was given, (B,)."""
    times = torch.tensor([schedule.angle(i / steps) for i in candidates]) * 2 / math.pi
    distance, nearest = (network.time.double()[:, None] - times).abs().min(1)
    assert distance.max() < 1e-6
    return np.array(list(candidates))[nearest.numpy()]


def angle_at(schedule, index, steps, ends_at_zero=True):
    """φ(i/N) of an array, 0 at i ≤ 0 where sampling ends."""
    return np.array([0.0 if ends_at_zero and i <= 0 else schedule.angle(i / steps) for i in index])


def noised(data, a):
    eps = kernels.randn(data.x.shape, seed=data.seed, sample_ids=data.sample_ids, step=streams.NOISE, device="cpu")
    return wide(cos(a)) * data.x + wide(sin(a)) * eps


RECIPES = {
    # name: (loss, the student's i, the angles of the teacher's steps from i)
    "stochastic": (
        lambda *given, **named: regression.stage2(*given, **named, sampler="stochastic"),
        lambda steps: range(1, steps + 1),
        lambda schedule, i, steps: [angle_at(schedule, i - back, steps) for back in (0, 1, 2)],
    ),
    "encoder": (
        regression.encoder,
        lambda steps: range(steps),
        lambda schedule, i, steps: [angle_at(schedule, i + on, steps, ends_at_zero=False) for on in (0, 0.5, 1)],
    ),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


def answers(seed=8):
    return torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_recipe
@every_schedule
@pytest.mark.parametrize("strengths", [RANGE, None], ids=["guided", "unguided"])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 256])
def test_loss_compares_with_the_velocity_that_lands_where_the_teacher_does(steps, strengths, schedule, recipe):
    """The student is asked at (z, a) with the teacher's w, at every i; the teacher takes two explicit steps of DDIM.

    The stochastic sampler's i = 1 has but one, from φ(1/N) to 0, and its i = 2 the second from φ(1/N) to 0.
    """
    loss_of, indices, angles_of = RECIPES[recipe]
    data, teacher = batch(), Teacher()
    student, network = recorded_student(schedule, answers())
    loss = loss_of(student, teacher, data, steps=steps, guidance_range=strengths)

    index = asked_index(network, schedule, indices(steps), steps)
    assert steps > 8 or set(index) == set(indices(steps))
    a, m, e = angles_of(schedule, index, steps)
    torch.testing.assert_close(network.z, noised(data, a), rtol=0, atol=1e-12)
    assert torch.equal(network.label, data.label)
    assert all(w is network.w or torch.equal(w, network.w) for w in teacher.strengths)
    assert (network.w is None) == (strengths is None)
    assert all((angle > 0).all() for angle in teacher.angles)

    mean = guided_mean(data.label, network.w)
    landing = step_ddim(step_ddim(network.z, a, m, mean), m, e, mean)
    target = landing_velocity(network.z, a, landing, e)
    torch.testing.assert_close(loss, truncated_snr_loss(target, network.output, a), rtol=1e-8, atol=0)

    perfect, _ = recorded_student(schedule, target)
    assert loss_of(perfect, teacher, data, steps=steps, guidance_range=strengths).max() < 1e-20


def wanted_velocity(loss_of, schedule, rows=64):
    """The target of a regression, from its gradient: ∂ mean((ṽ − v̂)²)/∂v̂ = −2·(ṽ − v̂)/n, here at v̂ = 0."""
    output = torch.zeros(rows, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    student, network = recorded_student(schedule, output)
    loss_of(student).sum().backward()
    return -output.grad * output[0].numel() / 2, network


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_one_step_up_with_the_encoders_target_is_two_of_the_teachers(steps, schedule):
    """The velocity belongs to the angle where the step starts: z' = cos δ·z + sin δ·ṽ with δ from there."""
    data, teacher = batch(), Teacher()
    target, network = wanted_velocity(
        lambda s: regression.encoder(s, teacher, data, steps=steps, guidance_range=RANGE, weight="v"), schedule
    )
    index = asked_index(network, schedule, range(steps), steps)
    a, m, e = RECIPES["encoder"][2](schedule, index, steps)
    mean = guided_mean(data.label, network.w)
    landing = step_ddim(step_ddim(network.z, a, m, mean), m, e, mean)
    rotated = wide(cos(e - a)) * network.z + wide(sin(e - a)) * target
    torch.testing.assert_close(rotated, landing, rtol=1e-9, atol=1e-9)


@every_schedule
def test_single_stochastic_step_learns_its_teachers_velocity(schedule):
    """At i = 1 there is no second half: what the student learns there is what its teacher says."""
    data, teacher = batch(), Teacher()
    options = {"steps": 2, "guidance_range": RANGE, "weight": "v", "sampler": "stochastic"}
    target, network = wanted_velocity(lambda student: regression.stage2(student, teacher, data, **options), schedule)
    first = asked_index(network, schedule, (1, 2), 2) == 1
    a = torch.full((64,), schedule.angle(0.5), dtype=torch.float64)
    expected = teacher(network.z, a, data.label, network.w)
    assert 0 < first.sum() < 64
    torch.testing.assert_close(target[first], expected[first], rtol=1e-12, atol=1e-12)
    assert ((target - expected)[~first].abs().amax((1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("steps", [2, 3, 16, 128])
def test_stochastic_student_without_loss_halves_its_teachers_error_of_the_deviation(steps):
    """It takes the teacher's two steps in one: the sampler's law with the product of two gains for one long one."""
    phi = grid(COSINE, steps)

    def student(z, angle, label, guidance):
        (i,) = (i for i in range(1, steps + 1) if phi[i] == angle[0])
        a, m, e = phi[i], phi[max(i - 1, 0)], phi[max(i - 2, 0)]
        return landing_velocity(z, a, step_ddim(step_ddim(z, a, m, MEAN), m, e, MEAN), e)

    law = stochastic_law(COSINE, steps, step_gain=lambda a, m, e: gain(a, m) * gain(m, e))
    assert_law(response(samplers.stochastic, student, steps), law)
    ratio = (STD - std_of(law)) / (STD - std_of(stochastic_law(COSINE, steps)))
    assert ratio < 1
    assert steps < 16 or ratio == pytest.approx(0.5, abs=0.1)


# --- two students -------------------------------------------------------------------------------------------------


def two_student_case(schedule, steps, w):
    """(targets of both heads, the student's and the teacher's network, batch, angles a, m, e, loss of a student)."""
    halves = [schedule.angle(j / (2 * steps)) for j in range(1, 2 * steps + 1)]
    teacher, data = ExactNetwork("v", halves), batch()

    def loss_of(student):
        return regression.two_student(student, denoiser(teacher, schedule), data, steps=steps, guidance=w, weight="v")

    target, network = wanted_velocity(loss_of, schedule, rows=128)
    index = asked_index(network, schedule, range(1, steps + 1), steps)[:64]
    angles = [angle_at(schedule, index - back, steps) for back in (0, 0.5, 1)]
    return (2 * target).chunk(2), network, teacher, data, angles, loss_of  # each head is half of the mean


two_students = pytest.mark.parametrize("steps, w", [(1, 2.0), (2, 0.5), (3, 0.0), (8, 4.0)])


@every_schedule
@two_students
def test_both_students_are_asked_at_the_same_points_with_label_and_null_class(schedule, steps, w):
    _, network, teacher, data, (a, m, _), _ = two_student_case(schedule, steps, w)
    null = torch.full_like(data.label, CLASSES)
    assert torch.equal(network.label, torch.cat([data.label, null]))
    assert network.w is None
    assert torch.equal(*network.time.chunk(2))
    assert torch.equal(*network.z.chunk(2))
    torch.testing.assert_close(network.z[:64], noised(data, a), rtol=0, atol=1e-12)
    first, second = (asked.chunk(len(asked) // 64) for asked in teacher.asked)
    assert all(torch.equal(asked, torch.from_numpy(a)) for asked in first)
    assert len(second) == 2 and all(torch.equal(asked, torch.from_numpy(m)) for asked in second)


@every_schedule
@two_students
def test_each_student_lands_where_its_own_second_step_goes_from_the_guided_first(schedule, steps, w):
    targets, network, _, data, (a, m, e), _ = two_student_case(schedule, steps, w)
    z = network.z[:64]
    middle = step_ddim(z, a, m, guided_mean(data.label, torch.full((64,), w)))
    for target, label in zip(targets, (data.label, torch.full_like(data.label, CLASSES)), strict=True):
        landing = step_ddim(middle, m, e, wide(MEANS[label]))
        torch.testing.assert_close(target, landing_velocity(z, a, landing, e), rtol=1e-8, atol=1e-8)


@every_schedule
@two_students
def test_two_students_guided_are_the_guided_teachers_two_steps(schedule, steps, w):
    (labelled, null), network, _, data, (a, m, e), _ = two_student_case(schedule, steps, w)
    z, mean = network.z[:64], guided_mean(data.label, torch.full((64,), w))
    landing = step_ddim(step_ddim(z, a, m, mean), m, e, mean)
    guided = (1 + w) * labelled - w * null
    torch.testing.assert_close(guided, landing_velocity(z, a, landing, e), rtol=1e-8, atol=1e-8)


@every_schedule
@two_students
def test_two_students_loss_is_the_mean_of_both_and_zero_for_the_targets(schedule, steps, w):
    targets, _, _, _, _, loss_of = two_student_case(schedule, steps, w)
    prediction = torch.cat([answers(1), answers(2)])
    losses = [(t - p).square().mean((1, 2, 3)) for t, p in zip(targets, prediction.chunk(2), strict=True)]
    found = loss_of(recorded_student(schedule, prediction)[0])
    torch.testing.assert_close(found, (losses[0] + losses[1]) / 2, rtol=1e-10, atol=0)
    assert loss_of(recorded_student(schedule, torch.cat(targets))[0]).max() < 1e-20


@every_schedule
def test_two_students_loss_weighs_as_stage_two_by_default(schedule):
    targets, _, teacher, data, (a, _, _), _ = two_student_case(schedule, 4, 1.0)
    prediction = torch.cat([answers(1), answers(2)])
    losses = [truncated_snr_loss(t, p, a) for t, p in zip(targets, prediction.chunk(2), strict=True)]
    student, _ = recorded_student(schedule, prediction)
    found = regression.two_student(student, denoiser(teacher, schedule), data, steps=4, guidance=1.0)
    torch.testing.assert_close(found, (losses[0] + losses[1]) / 2, rtol=1e-9, atol=0)
