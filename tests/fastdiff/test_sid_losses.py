"""Score identity distillation [SiD] against its definitions: the long way, central differences, and Gaussian data.

The long way works in [EDM]'s picture, x_t = x + σ·ε, with each family's image prediction written out; nothing of it is
taken from `fastdiff.sid`, `fastdiff.samplers` or `fastdiff.rotation`.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import wide
from scipy import stats
from torch import nn

import kernels
from fastdiff import samplers, streams
from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.losses import sid
from fastdiff.losses.batch import TIME, Batch
from fastdiff.rotation import Affine
from fastdiff.schedule import CosineSchedule, KarrasSchedule
from fastdiff.unet import UNetConfig
from train import loop
from train import sid as recipe
from train.options import LoopOptions
from train.updater import Updater

CLASSES, SHAPE = 3, (1, 2, 2)
D = math.prod(SHAPE)
FAMILIES = {"v": CosineSchedule(), "edm": KarrasSchedule()}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_alpha = pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
RANGE = (0.0, 4.0)
SIGMA = 2.5


def make(network, family, classes=CLASSES):
    unet = UNetConfig(SHAPE[1:], SHAPE[0], classes)
    return Denoiser(DenoiserConfig(unet, FAMILIES[family], family), network=network)


def draws(size=12, seed=17, first=1000):
    ids = torch.arange(first, first + size)
    return Batch(None, ids % CLASSES, ids, seed)


def rows_of(batch, rows):
    label = None if batch.label is None else batch.label[rows]
    return replace(batch, label=label, sample_ids=batch.sample_ids[rows])


def stream(batch, step):
    """Standard normals of one of the batch's streams, float64."""
    shape = (len(batch.sample_ids), *SHAPE)
    return kernels.randn(shape, seed=batch.seed, sample_ids=batch.sample_ids, step=step, device="cpu").double()


# --- the long way, with small random networks ---------------------------------------------------------------------


class Network(nn.Module):
    """A float64 network in which every pixel, the time, the label and the guidance matter."""

    def __init__(self, seed, classes=CLASSES):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.classes = classes
        self.mix, self.table, self.strength = (
            nn.Parameter(torch.randn(*size, generator=generator, dtype=torch.float64))
            for size in ((D, D), (classes + 1,), (1,))
        )

    def forward(self, z, time, label, guidance):
        label = torch.full((len(z),), self.classes) if label is None else label
        w = torch.zeros(len(z)) if guidance is None else guidance
        mixed = (z.double().flatten(1) @ self.mix.T).view(z.shape)
        return torch.tanh(mixed) * wide(1 + time) + wide(self.table[label]) + wide(self.strength * w)


def long_image(model, noisy, sigma, label, w):
    """What a denoiser makes of x_t = x + σ·ε: D of [EDM], or cos φ·z − sin φ·v at z = cos φ·x_t, σ = tan φ."""
    s = wide(sigma)
    if model.config.parameterization == "edm":
        norm = (s**2 + 0.25).sqrt()
        return 0.25 / norm**2 * noisy + 0.5 * s / norm * model.network(
            noisy / norm, (torch.log(sigma) / 4).float(), label, w
        )
    cos, sin = 1 / (1 + s**2).sqrt(), s / (1 + s**2).sqrt()
    return cos * cos * noisy - sin * model.network(cos * noisy, (torch.atan(sigma) * 2 / math.pi).float(), label, w)


def long_generated(generator, batch, w, sigma=SIGMA):
    start = torch.full((len(batch.sample_ids),), sigma, dtype=torch.float64)
    return long_image(generator, sigma * stream(batch, streams.GENERATOR_NOISE), start, batch.label, w)


def long_levels(batch, t_max=800):
    """σ(t) of the method's section 8, which counts t the other way round from [EDM]'s steps."""
    t = batch.uniform(TIME) * t_max / 1000
    return (80 ** (1 / 7) + (1 - t) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7


def long_loss(generator, teacher, fake, batch, alpha, *, omega=None, t_max=800, unguided=math.inf):
    """(loss (B,), ω (B,), score gap (B,)); omega: a constant in place of ω; unguided: σ beyond which f_φ has w = 0."""
    w, sigma = batch.guidance(RANGE), long_levels(batch, t_max)
    teacher_w = torch.where(sigma <= unguided, w, 0.0)
    x = long_generated(generator, batch, w)
    noisy = x + wide(sigma) * stream(batch, streams.NOISE)
    f, g = (long_image(m, noisy, sigma, batch.label, s) for m, s in ((teacher, teacher_w), (fake, w)))
    here = (x - f).abs().flatten(1).mean(1).detach()
    products = (f - g) * ((f - x) - alpha * (f - g))
    gap = (f - g).square().flatten(1).mean(1).sqrt()
    return 100 * products.flatten(1).sum(1) / (here if omega is None else omega), here, gap


def three(family):
    generator, teacher, fake = (make(Network(seed), family) for seed in (1, 2, 3))
    return generator, teacher.requires_grad_(False), fake.requires_grad_(False)


@every_family
@every_alpha
def test_generator_loss_is_the_long_way(alpha, family):
    models, batch = three(family), draws()
    loss, logged = sid.generator(*models, batch, alpha=alpha, guidance_range=RANGE)
    expected, _, gap = long_loss(*models, batch, alpha)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert logged.keys() == {"score_gap"}
    torch.testing.assert_close(logged["score_gap"].double(), gap, rtol=1e-5, atol=1e-6)
    assert not logged["score_gap"].requires_grad


def central_differences(function, parameters, step=1e-5):
    gradients = []
    with torch.no_grad():
        for parameter in parameters:
            flat, found = parameter.view(-1), torch.empty_like(parameter).view(-1)
            for i, value in enumerate(flat.tolist()):
                ends = []
                for sign in (1, -1):
                    flat[i] = value + sign * step
                    ends.append(float(function()))
                flat[i] = value
                found[i] = (ends[0] - ends[1]) / (2 * step)
            gradients.append(found.view(parameter.shape))
    return gradients


def gradients_of(loss, parameters):
    return torch.autograd.grad(loss, list(parameters))


@every_family
@every_alpha
def test_generator_gradient_equals_central_differences(alpha, family):
    """Of the long way, in every parameter of the generator, with ω held where it was."""
    models, batch = three(family), draws()
    parameters = list(models[0].parameters())
    loss, _ = sid.generator(*models, batch, alpha=alpha, guidance_range=RANGE)
    _, omega, _ = long_loss(*models, batch, alpha)
    expected = central_differences(lambda: long_loss(*models, batch, alpha, omega=omega)[0].sum() / 100, parameters)
    for found, wanted in zip(gradients_of(loss.sum() / 100, parameters), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    moving = central_differences(lambda: long_loss(*models, batch, alpha)[0].sum() / 100, parameters)
    assert relative(moving, expected) > 0.01  # the difference quotient could tell an ω with a gradient


def relative(found, expected):
    """The norm of a difference against the norm of what was expected."""
    norm = lambda tensors: math.sqrt(sum(float(t.square().sum()) for t in tensors))  # noqa: E731
    return norm([a - b for a, b in zip(found, expected, strict=True)]) / norm(expected)


class NoGradient(nn.Module):
    """A model whose network does not pass gradients on, as under no_grad."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def affine(self, *arguments):
        with torch.no_grad():
            return self.model.affine(*arguments)


class Detached(NoGradient):
    """A model whose image prediction does not depend on z for autograd."""

    def affine(self, z, *arguments):
        v = super().affine(z, *arguments).apply(z.detach())
        angle = arguments[0].double()  # x̂ = cos φ·z − sin φ·v: what cancels z is part of v
        cancelling = wide(torch.cos(angle) / torch.sin(angle)) * (z - z.detach())
        return Affine(v + cancelling, torch.zeros_like(angle), torch.ones_like(angle))


@every_family
@pytest.mark.parametrize("cut", [NoGradient, Detached])
@pytest.mark.parametrize("which", ["teacher", "fake"])
def test_the_gradient_goes_through_both_score_networks(which, cut, family):
    """A version that cuts either has the same loss and another gradient."""
    generator, teacher, fake = three(family)
    batch, parameters = draws(), list(generator.parameters())
    models = (cut(teacher), fake) if which == "teacher" else (teacher, cut(fake))
    (whole, _), (without, _) = (
        sid.generator(generator, *pair, batch, guidance_range=RANGE) for pair in ((teacher, fake), models)
    )
    torch.testing.assert_close(without, whole, rtol=1e-6, atol=1e-6)
    expected = gradients_of(whole.sum(), parameters)
    assert relative(gradients_of(without.sum(), parameters), expected) > 0.05


def test_score_networks_collect_no_gradient():
    models, batch = three("v"), draws()
    before = [{key: value.clone() for key, value in model.state_dict().items()} for model in models]
    loss, _ = sid.generator(*models, batch, guidance_range=RANGE)
    loss.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in models[0].parameters())
    assert all(p.grad is None for model in models[1:] for p in model.parameters())
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("t_max", [1000, 800, 300])
def test_noise_levels_are_uniform_in_t_up_to_its_limit(t_max):
    seen, models, batch = [], three("edm"), draws(2000)

    def spy(z, angle, label, guidance):
        seen.append(torch.tan(angle))
        return models[1](z, angle, label, guidance)

    with torch.no_grad():
        sid.generator(models[0], spy, spy, batch, t_max=t_max)
    for sigma in seen:
        torch.testing.assert_close(sigma, long_levels(batch, t_max), rtol=1e-9, atol=0)
    t = batch.uniform(TIME).numpy()
    assert stats.kstest(t, "uniform").pvalue > 0.01
    largest = {1000: 80, 800: 24.4, 300: 0.3185}[t_max]
    assert seen[0].max() == pytest.approx(largest, rel=0.02) and seen[0].min() == pytest.approx(0.002, rel=0.02)


def test_defaults_are_the_published_ones():
    models, batch = three("v"), draws()
    default, _ = sid.generator(*models, batch, guidance_range=RANGE)
    expected, _, _ = long_loss(*models, batch, 1.2, t_max=800)
    torch.testing.assert_close(default, expected, rtol=1e-6, atol=1e-6)
    assert samplers.SIGMA_INIT == SIGMA and sid.SCALE == 100


def test_a_sample_depends_on_its_id_the_seed_and_its_label_alone():
    models, batch = three("edm"), draws()
    for loss in (
        lambda b: sid.generator(*models, b, guidance_range=RANGE)[0],
        lambda b: sid.fake_score(models[2], models[0], b, guidance_range=RANGE),
    ):
        with torch.no_grad():
            whole = loss(batch)
            for rows in ([0], [7, 2], [11, 3, 5, 8]):
                torch.testing.assert_close(loss(rows_of(batch, rows)), whole[rows], rtol=1e-9, atol=1e-9)
            assert ((loss(replace(batch, seed=18)) - whole).abs() > 1e-4 * whole.abs()).all()
            assert ((loss(replace(batch, label=(batch.label + 1) % CLASSES)) - whole).abs() > 1e-6).all()


def test_every_use_of_randomness_has_its_own_stream():
    numbers = [streams.NOISE, streams.LABEL_DROP, streams.GENERATOR_NOISE, streams.LABELS]
    assert len(set(numbers)) == 4 and min(numbers) >= streams.TRAINING  # samplers use those below


def test_the_strength_reaches_all_three_networks():
    batch, seen = draws(), {}

    class Spy(Network):
        def forward(self, z, time, label, guidance):
            seen[self] = guidance
            return super().forward(z, time, label, guidance)

    models = [make(Spy(seed), "v") for seed in (1, 2, 3)]
    sid.generator(*models, batch, guidance_range=(1.0, 3.0))
    assert len(seen) == 3
    for w in seen.values():
        assert torch.equal(w, batch.guidance((1.0, 3.0))) and 1 <= w.min() < w.max() <= 3
    seen.clear()
    sid.fake_score(models[2], models[0], batch, guidance_range=(1.0, 3.0))
    assert len(seen) == 2 and all(torch.equal(w, batch.guidance((1.0, 3.0))) for w in seen.values())
    seen.clear()
    sid.generator(*models, batch)
    assert list(seen.values()) == [None] * 3


@every_family
@pytest.mark.parametrize(("t_max", "limit"), [(800, 380), (450, 380), (450, 0), (450, 450), (800, 1000)])
def test_guidance_of_the_teacher_ends_where_it_is_told(t_max, limit, family):
    """For the teacher alone: the images have a strength at every noise level."""
    models, batch = three(family), draws(64)
    options = {"t_max": t_max, "guidance_range": RANGE}
    found, _ = sid.generator(*models, batch, guidance_t_max=limit, **options)
    end = (80 ** (1 / 7) + (1 - limit / 1000) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    expected, _, _ = long_loss(*models, batch, 1.2, t_max=t_max, unguided=end)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    guided = sid.generator(*models, batch, **options)[0]
    share = (guided == found).double().mean()
    assert share == pytest.approx(min(1, limit / t_max), abs=0.05)


# --- fake score ---------------------------------------------------------------------------------------------------


@every_family
def test_fake_score_loss_is_edms_in_its_own_words(family):
    """λ(σ)·mean (D(x + σ·ε; σ) − x)² with λ = (σ² + σ_d²)/(σ·σ_d)², ln σ ~ N(−1.2, 1.2²), without a constant factor."""
    generator, _, fake = three(family)
    batch = draws(64)
    w, x = batch.guidance(RANGE), long_generated(generator, batch, batch.guidance(RANGE))
    sigma = torch.from_numpy(np.exp(-1.2 + 1.2 * stats.norm.ppf(batch.uniform(TIME).numpy())))
    denoised = long_image(fake, x + wide(sigma) * stream(batch, streams.NOISE), sigma, batch.label, w)
    error = (denoised - x).square().flatten(1).mean(1)
    expected = (sigma**2 + 0.25) / (sigma * 0.5) ** 2 * error
    found = sid.fake_score(fake, generator, batch, guidance_range=RANGE)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-7)


def test_fake_score_sends_gradients_to_the_fake_alone():
    generator, _, fake = three("v")
    sid.fake_score(fake.requires_grad_(True), generator, draws(), guidance_range=RANGE).sum().backward()
    assert all(p.grad is not None for p in fake.parameters())
    assert all(p.grad is None for p in generator.parameters())


def test_fake_score_sees_the_labels_of_its_images():
    """No label is dropped: the unconditional model is not needed of it."""
    seen = []

    class Spy(Network):
        def forward(self, z, time, label, guidance):
            seen.append(label)
            return super().forward(z, time, label, guidance)

    batch = draws(500)
    sid.fake_score(make(Spy(1), "v"), make(Spy(2), "v"), batch)
    assert len(seen) == 2 and all(torch.equal(label, batch.label) for label in seen)


# --- one step -----------------------------------------------------------------------------------------------------

MEAN = torch.tensor([0.3, -0.2, 0.5, 0.0], dtype=torch.float64)
_orthogonal = [
    torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    for seed in (0, 1)
]
ROOT = _orthogonal[0] * torch.tensor([0.7, 0.5, 0.3, 0.15]).double()
COVARIANCE = ROOT @ ROOT.T
# A generator to start from: another mean, other axes, wider than the data along some of them.
START = MEAN + torch.tensor([-0.5, 0.5, -0.5, 0.2]), _orthogonal[1] * torch.tensor([0.42, 0.28, 0.35, 0.21]).double()


class GaussianNetwork(nn.Module):
    """What the exact denoiser of N(mean, root·rootᵀ) has for a network: v, or [EDM]'s F, expected from its input.

    Input and output are linear in (x, ε), so that the output's expectation is a regression on the input.
    """

    def __init__(self, mean, root, family):
        super().__init__()
        self.mean, self.root, self.family = nn.Parameter(mean.clone()), nn.Parameter(root.clone()), family

    def forward(self, z, time, label, guidance):
        time = time.double()
        if self.family == "edm":
            sigma = torch.exp(4 * time)
            norm = (sigma**2 + 0.25).sqrt()
            seen, wanted = (1 / norm, sigma / norm), (2 * sigma / norm, -0.5 / norm)
        else:
            cos, sin = torch.cos(time * math.pi / 2), torch.sin(time * math.pi / 2)
            seen, wanted = (cos, sin), (-sin, cos)
        of_x, of_noise = self.root @ self.root.mT, torch.eye(D, dtype=torch.float64)
        total, cross = (
            (a * b)[:, None, None] * of_x + (c * d)[:, None, None] * of_noise
            for (a, c), (b, d) in ((seen, seen), (wanted, seen))
        )
        centred = z.double().flatten(1) - seen[0][:, None] * self.mean
        expected = wanted[0][:, None] * self.mean + torch.linalg.solve(total, cross @ centred[..., None])[..., 0]
        return expected.view(z.shape)


def exact(mean, root, family):
    """The exact denoiser of N(mean, root·rootᵀ), frozen."""
    return make(GaussianNetwork(mean, root, family), family, classes=0).requires_grad_(False)


def posterior(noisy, sigma, mean=MEAN, covariance=COVARIANCE):
    """E[x | x_t], (B, D)."""
    gain = covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(D, dtype=torch.float64))
    return mean + (noisy - mean) @ gain.T


@every_family
@pytest.mark.parametrize("sigma", [0.01, SIGMA, 24.0])
def test_one_step_on_gaussian_data_is_the_posterior_mean_of_noise(sigma, family):
    n = stream(draws(32), 0)
    found = samplers.one_step(
        exact(MEAN, ROOT, family),
        n,
        None,
        None,
        1,
        schedule=FAMILIES[family],
        **({} if sigma == SIGMA else {"sigma": sigma}),
    )
    torch.testing.assert_close(found.flatten(1), posterior(sigma * n.flatten(1), sigma), rtol=1e-5, atol=1e-6)


@every_family
def test_a_model_denoises_at_every_angle(family):
    batch = draws(64)
    angle = torch.atan(long_levels(batch, 1000))
    noisy = MEAN + stream(batch, 0).flatten(1) * (COVARIANCE.trace() + angle.tan()[:, None] ** 2).sqrt()
    z = torch.cos(angle)[:, None] * noisy
    found = samplers.denoised(exact(MEAN, ROOT, family), z.view(-1, *SHAPE), angle, None, None).flatten(1)
    expected = torch.cat([posterior(row[None], sigma) for row, sigma in zip(noisy, torch.tan(angle), strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_one_step_is_one_call_at_its_angle_with_all_that_it_was_given():
    calls, reported = [], []

    def model(z, angle, label, guidance):
        calls.append((z, angle, label, guidance))
        return torch.ones_like(z)

    n, label, w = stream(draws(3), 0), torch.tensor([2, 0, 1]), torch.tensor([0.5, 1.0, 4.0])
    images = samplers.one_step(
        model,
        n,
        label,
        w,
        1,
        schedule=FAMILIES["v"],
        sigma=0.75,
        seed=4,
        sample_ids=torch.arange(3),
        on_step=lambda i, z: reported.append((i, z)),
    )
    ((z, angle, seen_label, seen_w),) = calls
    torch.testing.assert_close(z, 0.6 * n)  # tan φ = 3/4
    torch.testing.assert_close(torch.tan(angle), torch.full((3,), 0.75, dtype=torch.float64))
    assert torch.equal(seen_label, label) and torch.equal(seen_w, w)
    torch.testing.assert_close(images, 0.8 * 0.6 * n - 0.6)
    assert len(reported) == 1 and reported[0][0] == 1 and torch.equal(reported[0][1], images)


@pytest.mark.parametrize("steps", [0, -1, 2, 64])
def test_one_step_takes_one_step(steps):
    calls = []
    with pytest.raises(ValueError, match=str(steps)):
        samplers.one_step(calls.append, stream(draws(2), 0), None, None, steps, schedule=FAMILIES["v"])
    assert not calls


@every_family
def test_one_step_images_do_not_depend_on_the_batch(family):
    model, batch = three(family)[0], draws()
    n, w = stream(batch, 0), batch.guidance(RANGE)

    def images(rows):
        return samplers.one_step(model, n[rows], batch.label[rows], w[rows], 1, schedule=model.schedule)

    whole = images(slice(None))
    for rows in ([0], [5, 2], [11, 0, 7]):
        torch.testing.assert_close(images(rows), whole[rows], rtol=1e-12, atol=1e-12)


def test_one_step_limits_its_images_as_asked():
    model, n = exact(MEAN, 20 * ROOT, "v"), stream(draws(64), 0)
    free, limited = (samplers.one_step(model, n, None, None, 1, schedule=model.schedule, clip=c) for c in (None, 1.0))
    assert free.abs().max() > 1.5
    torch.testing.assert_close(limited, free.clamp(-1, 1))


# --- Gaussian data and exact score networks -----------------------------------------------------------------------


class AffineGenerator(nn.Module):
    """x = mean + root·n of the noise n that it starts from; mean and root may be those of each sample, (B, …)."""

    image_shape = SHAPE

    def __init__(self, mean, root, family):
        super().__init__()
        self.mean, self.root, self.schedule = nn.Parameter(mean.clone()), nn.Parameter(root.clone()), FAMILIES[family]

    def forward(self, z, angle, label, guidance):
        cos, sin = wide(torch.cos(angle)), wide(torch.sin(angle))
        n = (z.double() / sin).flatten(1)
        x = self.mean + (self.root @ n[..., None])[..., 0]
        return (cos * z.double() - x.view(z.shape)) / sin


@pytest.fixture
def unweighted(monkeypatch):
    """`sid.generator` without 1/ω, which is taken out again where it is put in."""
    real = sid.generator_loss

    def without(teacher_x, fake_x, x, alpha):
        omega = (x - teacher_x).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
        return real(teacher_x, fake_x, x, alpha) * omega

    monkeypatch.setattr(sid, "generator_loss", without)


def score_matching(mean, covariance, fake, sigma):
    """E‖f_φ(x_t) − f_ψ(x_t)‖² (B,) for x_t ~ N(mean, covariance + σ²), f_φ exact for the data, f_ψ for N(*fake).

    Both are affine in x_t, so f_φ − f_ψ is normal about its value at the mean.
    """
    blur = (sigma**2)[:, None, None] * torch.eye(D, dtype=torch.float64)
    at_mean, slopes = [], []
    for m, c in ((MEAN, COVARIANCE), fake):
        gain = (c + blur).inverse() @ c  # symmetric: both factors have the same axes
        at_mean.append(m + (gain @ (mean - m)[..., None])[..., 0])
        slopes.append(gain)
    difference = slopes[0] - slopes[1]
    spread = (difference @ (covariance + blur) @ difference.mT).diagonal(dim1=1, dim2=2).sum(1)
    return (at_mean[0] - at_mean[1]).square().sum(1) + spread


def analytic(batch, which):
    """(values (B,), gradients (B, parameters)) of the objective at START at each sample's σ, by its own parameters."""
    mean, root = (p.expand(len(batch.sample_ids), *p.shape).clone().requires_grad_() for p in START)
    covariance = root @ root.mT
    fake = (mean, covariance) if which == "whole" else (mean.detach(), covariance.detach())
    values = score_matching(mean, covariance, fake, long_levels(batch))
    gradients = torch.autograd.grad(values.sum(), (mean, root))
    return values.detach(), torch.cat([g.flatten(1) for g in gradients], 1)


def test_the_analytic_objective_is_what_sampling_gives():
    """So that what is compared with is not wrong itself: within four standard errors, at the samples' own σ."""
    batch = draws(40_000)
    sigma = long_levels(batch)
    noisy = START[0] + stream(batch, 0).flatten(1) @ START[1].T + sigma[:, None] * stream(batch, 1).flatten(1)
    f, g = (
        long_image(exact(*which, "v"), noisy.view(-1, *SHAPE), sigma, None, None) for which in ((MEAN, ROOT), START)
    )
    excess = (f - g).square().flatten(1).sum(1) - analytic(batch, "whole")[0]
    assert abs(excess.mean()) < 4 * excess.std() / math.sqrt(len(excess))


@every_family
@every_alpha
def test_generator_gradient_is_that_of_model_based_score_matching(alpha, family, unweighted):
    """With exact score networks, ½·∇L − (α − ½)·A within 4.5 standard errors of each of the 20 parameters.

    L(θ) = E‖d‖² with d = f_φ − f_ψ*(θ) is the model-based explicit score matching objective, and A its gradient with
    f_ψ* held constant. Proof: let M = E‖d‖² and P = E[d·(f_φ − x)], both by way of the samples, f_ψ a constant. As
    E[x | x_t] = f_ψ*(θ)(x_t), P = E[d·(f_φ − f_ψ*(θ))], so that ∇P = A − C with C = E[d·∂f_ψ*/∂θ]; and ∇L = A − 2C.
    The loss is P − α·M, so its gradient is A − C − α·A = ½·∇L − (α − ½)·A: at α = ½ half of the objective's own, at 1
    what comes of f_ψ* alone, −C, and in between and beyond a combination. By the same identity its value is (1 − α)·L.
    All this is for a weight that does not depend on the sample; with 1/ω it does not hold.
    """
    batch = Batch(None, None, torch.arange(20_000), 3)
    generator = AffineGenerator(*(p.expand(20_000, *p.shape) for p in START), family)  # a gradient for each sample
    loss, _ = sid.generator(generator, exact(MEAN, ROOT, family), exact(*START, family), batch, alpha=alpha)
    loss.sum().backward()
    found = torch.cat([generator.mean.grad, generator.root.grad.flatten(1)], 1) / sid.SCALE
    (objective, whole), (_, fixed) = analytic(batch, "whole"), analytic(batch, "fixed")

    def errors(expected):
        rest = found - expected
        return float((rest.mean(0) / (rest.std(0) / math.sqrt(len(rest)))).abs().max())

    assert errors(whole / 2 - (alpha - 0.5) * fixed) < 4.5
    if alpha != 0.5:
        assert errors(whole / 2) > 30  # the objective's own gradient it is at α = ½ alone
    rest = loss.detach() / sid.SCALE - (1 - alpha) * objective
    assert abs(rest.mean()) < 4 * rest.std() / math.sqrt(len(rest))


@every_family
@every_alpha
def test_a_generator_of_the_data_stays(alpha, family):
    """f_φ = f_ψ* leaves no gradient to any single sample, whatever its weight."""
    batch = Batch(None, None, torch.arange(500), 3)
    root = ROOT @ _orthogonal[1]  # other images of the same distribution
    generator = AffineGenerator(MEAN.expand(500, D), root.expand(500, D, D), family)
    loss, _ = sid.generator(generator, exact(MEAN, ROOT, family), exact(MEAN, root, family), batch, alpha=alpha)
    loss.sum().backward()
    assert max(float(p.grad.abs().max()) for p in generator.parameters()) < 1e-8


def moments(generator, **options):
    """Mean and covariance of the images of a generator that is affine in its noise."""
    noise = torch.cat([torch.zeros(1, D), torch.eye(D)]).double().view(-1, *SHAPE)
    with torch.no_grad():
        mean, *columns = samplers.one_step(
            generator, noise, None, None, 1, schedule=generator.schedule, **options
        ).flatten(1)
    root = torch.stack(columns, 1) - mean[:, None]
    return mean, root @ root.T


@every_family
@every_alpha
def test_generator_converges_to_the_data_with_exact_score_networks(alpha, family):
    """The fake score is recomputed for each update. Noise ends with the gap of the scores: the end is sharp."""
    teacher, generator, updates, size = exact(MEAN, ROOT, family), AffineGenerator(*START, family), 120, 64
    optimizer = torch.optim.Adam(generator.parameters(), betas=(0.0, 0.999))
    for n in range(updates):
        fake = exact(generator.mean.detach(), generator.root.detach(), family)
        batch = Batch(None, None, torch.arange(n * size, (n + 1) * size), 5)
        loss, _ = sid.generator(generator, teacher, fake, batch, alpha=alpha)
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - n / updates)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    mean, covariance = moments(generator)
    torch.testing.assert_close(mean, MEAN, rtol=0, atol=1e-4)
    torch.testing.assert_close(covariance, COVARIANCE, rtol=0, atol=1e-4)


def test_generator_converges_to_the_data_with_a_score_that_is_learned(tmp_path, monkeypatch):
    """The recipe itself, with networks that can be the exact denoiser of any Gaussian and nothing else."""
    monkeypatch.setattr(loop, "preview", lambda *args, **kwargs: None)
    teacher = exact(MEAN, ROOT, "v")
    options = recipe.Options(
        teacher=tmp_path,
        out=tmp_path,
        updates=200,
        batch_size=128,
        lr=0.02,
        fake_lr=0.03,
        ema=0.0,
        anneal="linear",
        device="cpu",
    )
    updaters, batches = recipe.learning(teacher, options)
    with torch.no_grad():
        updaters[-1].denoiser.network.mean += torch.tensor([-0.5, 0.5, -0.5, 0.5])
    before = moments(updaters[-1].denoiser)
    generator = loop.run(updaters, batches, options, "sid")
    after = moments(generator)
    distances = [
        [float((found - wanted).abs().max()) for found, wanted in zip(state, (MEAN, COVARIANCE), strict=True)]
        for state in (before, after)
    ]
    assert distances[0][0] > 0.4 and distances[0][1] > 0.3
    assert distances[1][0] < 0.06 and distances[1][1] < 0.06, distances


# --- samples that are not finite ----------------------------------------------------------------------------------


class Broken(nn.Module):
    """A network that puts out a value that is not finite for one label."""

    def __init__(self, network, value, label=1):
        super().__init__()
        self.network, self.value, self.label = network, value, label

    def forward(self, z, time, label, guidance):
        out = self.network(z, time, label, guidance)
        return torch.where(wide(label == self.label) > 0, self.value, out)


def updated(updater, batch):
    """The gradients that an update hands to the optimizer."""
    found = []
    updater.optimizer.step = lambda: found.extend(p.grad.clone() for p in updater.parameters)
    updater.update(batch)
    return found


def updater_of(model, loss):
    options = LoopOptions(out=Path("unused"), batch_size=12, clip_norm=0.0)
    return Updater(options, model, loss, tolerance=0.01)


BREAKS = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])


@BREAKS
@pytest.mark.parametrize("which", [0, 1, 2], ids=["generator", "teacher", "fake"])
def test_a_sample_that_is_not_finite_sends_the_generator_no_gradient(which, value):
    models, batch = list(three("edm")), draws()
    kept = [i for i, label in enumerate(batch.label.tolist()) if label != 1]
    loss, _ = sid.generator(*models, rows_of(batch, kept), guidance_range=RANGE)
    expected = gradients_of(loss.sum() / len(batch.label), models[0].parameters())
    models[which] = make(Broken(models[which].network, value), "edm")
    updater = updater_of(models[0], lambda model, b: sid.generator(model, *models[1:], b, guidance_range=RANGE))
    for found, wanted in zip(updated(updater, batch), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert int(updater.dropped) == len(batch.label) - len(kept) == 4
    assert updater.grad_norm > 0 and int(updater.first_bad) == -1


@BREAKS
@pytest.mark.parametrize("which", [0, 2], ids=["generator", "fake"])
def test_a_sample_that_is_not_finite_sends_the_fake_score_no_gradient(which, value):
    models, batch = list(three("edm")), draws()
    models[2].requires_grad_(True)
    kept = [i for i, label in enumerate(batch.label.tolist()) if label != 1]
    loss = sid.fake_score(models[2], models[0], rows_of(batch, kept), guidance_range=RANGE)
    expected = gradients_of(loss.sum() / len(batch.label), models[2].parameters())
    models[which] = make(Broken(models[which].network, value), "edm")
    updater = updater_of(models[2], lambda model, b: sid.fake_score(model, models[0], b, guidance_range=RANGE))
    for found, wanted in zip(updated(updater, batch), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert int(updater.dropped) == 4


def test_a_line_of_the_log_is_finite_where_a_sample_was_not():
    """Every line of the log is JSON, which knows no NaN."""
    generator, teacher, fake = three("edm")
    broken = make(Broken(teacher.network, math.nan), "edm")
    updater = updater_of(generator, lambda model, b: sid.generator(model, broken, fake, b, guidance_range=RANGE))
    updater.update(draws())
    row = updater.log()
    assert {"loss", "loss_quarters", "score_gap_quarters"} <= row.keys()
    assert np.isfinite([*row["loss_quarters"], *row["score_gap_quarters"], row["loss"], row["grad_norm"]]).all(), row
