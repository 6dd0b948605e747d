"""[EDM] (Karras et al., 2022): its training loss and Heun's sampler against the paper's own words, in σ = tan φ."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import command_lines
import pytest
import torch
from command_lines import assert_refused, write_images
from common import TINY, randomize, wide
from scipy import stats
from torch import nn

import kernels
from fastdiff import checkpoint, data, rotation, samplers, streams
from fastdiff.denoiser import Denoiser, DenoiserConfig, Guided
from fastdiff.generate import Sampling, generate
from fastdiff.losses import regression
from fastdiff.losses.batch import TIME, Batch
from fastdiff.schedule import CosineSchedule, KarrasSchedule, LinearBetaSchedule
from fastdiff.unet import UNetConfig
from train.batches import to_device
from train.options import LoopOptions
from train.updater import Updater

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")

KARRAS = KarrasSchedule()
SCHEDULES = [KARRAS, CosineSchedule(), LinearBetaSchedule()]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
every_parameterization = pytest.mark.parametrize("parameterization", rotation.PARAMETERIZATIONS)
EDM_LOSS = {"label_drop": 0.0, "weight": "edm", "noise_levels": "lognormal"}
EDM_LINE = ["--schedule", "karras", "--parameterization", "edm", "--weight", "edm", "--noise-levels", "lognormal"]
TINY_LINE = ["--unet.channels", 8, "--unet.channel-mult", 1]
CLASSES, SHAPE, SIGMA_DATA = 3, (2, 4, 4), 0.5


class Network(nn.Module):
    """A float64 network that depends on the image, the time and the label."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mix = nn.Parameter(torch.randn(SHAPE[0], SHAPE[0], generator=generator, dtype=torch.float64))
        self.table = nn.Parameter(torch.randn(CLASSES + 1, generator=generator, dtype=torch.float64))

    def forward(self, z, time, label, guidance):
        label = torch.full((len(z),), CLASSES) if label is None else label
        mixed = torch.einsum("dc,bchw->bdhw", self.mix, z)
        time, bias = wide(time), self.table[label][:, None, None, None]
        return torch.tanh(mixed + time) + (1 + time) * bias


def denoiser(network=None, *, parameterization="edm", schedule=KARRAS, classes=CLASSES):
    config = DenoiserConfig(UNetConfig(SHAPE[1:], SHAPE[0], classes), schedule, parameterization)
    return Denoiser(config, network=network or Network())


def batch(size=16, *, seed=17, first=1000):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(size, *SHAPE, generator=generator, dtype=torch.float64) * 2 - 1
    return Batch(x, torch.randint(CLASSES, (size,), generator=generator), torch.arange(first, first + size), seed)


# --- the training loss --------------------------------------------------------------------------------------------


def denoised(model, x, sigma, label):
    """D(x; σ) of x = y + n: [EDM] eq. 7 and table 1; other networks see the variance-preserving x/√(1 + σ²)."""
    name, s = model.config.parameterization, wide(sigma)
    if name == "edm":
        c_skip, c_out = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2), s * SIGMA_DATA / (s**2 + SIGMA_DATA**2).sqrt()
        c_in, c_noise = 1 / (s**2 + SIGMA_DATA**2).sqrt(), torch.log(sigma) / 4
        return c_skip * x + c_out * model.network(c_in * x, c_noise.float(), label, None)
    scale = (1 + s**2).sqrt()
    output = model.network(x / scale, (torch.atan(sigma) / (math.pi / 2)).float(), label, None)
    return {"eps": x - s * output, "x": output, "v": (x / scale - s * output) / scale}[name]


def edm_loss(model, y, sigma, noise, label):
    """λ(σ)·‖D(y + n; σ) − y‖², as a mean over pixels."""
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    return weight * (denoised(model, y + wide(sigma) * noise, sigma, label) - y).square().mean((1, 2, 3))


@every_schedule
@every_parameterization
def test_the_loss_is_edms_in_its_own_words_for_every_network(parameterization, schedule):
    """The times reach the networks as float32, which may round either way: hence 1e-6."""
    model, given = denoiser(parameterization=parameterization, schedule=schedule), batch()
    sigma = torch.from_numpy(stats.lognorm(s=1.2, scale=math.exp(-1.2)).ppf(given.uniform(TIME).numpy()))
    noise = kernels.randn(given.x.shape, seed=given.seed, sample_ids=given.sample_ids, step=streams.NOISE, device="cpu")
    expected = edm_loss(model, given.x, sigma, noise.double(), given.label)
    found = regression.teacher(model, given, **EDM_LOSS)
    assert expected.dtype == torch.float64 and expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    parameters = list(model.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(loss.sum(), parameters) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * theirs.abs().max().item())


def test_the_weight_is_lambda_on_the_error_of_x_and_one_on_the_error_of_f():
    sigma = torch.tensor([2e-4, 0.002, 0.3, 0.5, 1.0, 80.0, 5e3], dtype=torch.float64)
    angle = torch.atan(sigma)
    weight = rotation.loss_weight("edm", angle)
    in_x = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2 * torch.sin(angle) ** 2
    torch.testing.assert_close(weight, in_x, rtol=1e-12, atol=0)
    _, coef_f = rotation.velocity_coefficients("edm", angle)
    torch.testing.assert_close(weight * coef_f**2, torch.ones(7, dtype=torch.float64), rtol=1e-12, atol=0)


class Silent(nn.Module):
    def forward(self, z, time, label, guidance):
        return torch.zeros_like(z)


def test_what_the_network_learns_has_variance_one_at_every_noise_level():
    """[EDM] chose it so, for data of deviation ½: the loss of an answer of zero is 1 on average, whatever σ."""
    size = 16_384
    y = SIGMA_DATA * torch.randn(size, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = Batch(y, None, torch.arange(size), 3)
    loss = regression.teacher(denoiser(Silent(), classes=0), given, **EDM_LOSS)
    by_noise = loss[given.uniform(TIME).argsort()].view(16, -1)
    error = math.sqrt(2 / (by_noise.shape[1] * math.prod(SHAPE)))  # of the mean of that many squared normals
    assert (by_noise.mean(1) - 1).abs().max() < 4 * error


def test_noise_levels_are_lognormal_and_evenly_spread_over_consecutive_samples():
    given = batch(2000)
    angle = regression.noise_angle(KARRAS, given.uniform(TIME), "lognormal")
    drawn = torch.log(torch.tan(angle)).numpy()
    assert stats.kstest(drawn, stats.norm(-1.2, 1.2).cdf).statistic < 2 / 2000  # independent draws would have 1/√2000
    assert not torch.equal(angle, KARRAS.angle(given.uniform(TIME)))


@every_schedule
def test_noise_levels_of_the_schedule_are_the_default(schedule):
    model, given = denoiser(schedule=schedule), batch()
    uniform = given.uniform(TIME)
    assert torch.equal(regression.noise_angle(schedule, uniform, "schedule"), schedule.angle(uniform))
    assert torch.equal(regression.teacher(model, given), regression.teacher(model, given, noise_levels="schedule"))
    assert not torch.equal(regression.teacher(model, given), regression.teacher(model, given, noise_levels="lognormal"))


@every_parameterization
def test_the_ends_of_the_uniform_numbers_give_finite_losses(parameterization, monkeypatch):
    """u = 0, for which Φ⁻¹ is −∞, up to the largest below 1, in float32 as in training."""
    ends = torch.tensor([0.0, 2**-53, 1e-9, 0.5, 1 - 2**-53], dtype=torch.float64)
    monkeypatch.setattr(Batch, "uniform", lambda self, which: ends)
    angle = regression.noise_angle(KARRAS, ends, "lognormal")
    assert (angle > 0).all() and (angle < math.pi / 2).all() and (angle.diff() >= 0).all()
    model, given = denoiser(Network().float(), parameterization=parameterization), batch(5)
    given = replace(given, x=given.x.float())
    monkeypatch.setattr(Network, "forward", lambda self, z, time, label, guidance: self.mix.mean() * z)
    loss = regression.teacher(model, given, **EDM_LOSS)
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), model.network.mix)[0].isfinite().all()


def test_unknown_noise_levels_are_refused_by_name():
    with pytest.raises(ValueError, match=r"normal.*lognormal"):
        regression.teacher(denoiser(), batch(), noise_levels="normal")


def test_an_update_never_waits_for_the_device(tmp_path):
    """On the meta device, where a wait raises."""
    meta = torch.device("meta")
    with meta:
        model = Denoiser(DenoiserConfig(TINY, KARRAS, "edm"))
    ids = torch.arange(8)
    given = to_device(data.Batch(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), ids % 10, ids), 10, 1, meta)
    options = LoopOptions(out=tmp_path, batch_size=8)
    Updater(options, model, lambda model, batch: regression.teacher(model, batch, **EDM_LOSS)).update(given)


# --- Heun's sampler -----------------------------------------------------------------------------------------------


def start_noise(size=4, dtype=torch.float64):
    return torch.randn(size, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def mixture(x, sigma):
    """E[y | y + n] of two Gaussians at ±0.6, of deviation 0.3 each, in every pixel alone."""
    variance = 0.09 + sigma**2
    mean = 0.6 * torch.tanh(0.6 * x / variance)
    return mean + 0.09 / variance * (x - mean)


def as_model(denoise):
    """The velocity of a denoiser D(x; σ): x̂ = D(z/cos φ; tan φ), v = (cos φ·z − x̂)/sin φ."""

    def model(z, angle, label, guidance):
        cos, sin = wide(torch.cos(angle)), wide(torch.sin(angle))
        model.angles.append(angle[0].item())
        return (cos * z - denoise(z / cos, sin / cos)) / sin

    model.angles = []
    return model


def grid(schedule, steps):
    """σ_0 … σ_{N−1} at t = 1 … 0 in equal steps, then 0."""
    times = [1 - i / (steps - 1) for i in range(steps)] if steps > 1 else [1.0]
    return [*(math.tan(schedule.angle(t)) for t in times), 0.0]


def algorithm_1(denoise, x, sigmas):
    """[EDM] algorithm 1 with S_churn = 0: [x_1, …, x_N]."""
    found = []
    for t, t_next in pairwise(sigmas):
        d = (x - denoise(x, t)) / t
        x_next = x + (t_next - t) * d
        if t_next != 0:
            d_next = (x_next - denoise(x_next, t_next)) / t_next
            x_next = x + (t_next - t) * (d / 2 + d_next / 2)
        x = x_next
        found.append(x)
    return found


# Not 2 or 3 steps on the cosine schedule, whose σ falls so much in each that the σ form loses its digits in float64.
STEPS = [(s, n) for s in SCHEDULES for n in (1, 2, 3, 18, 100) if n not in (2, 3) or not isinstance(s, CosineSchedule)]


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(("schedule", "steps"), STEPS, ids=lambda p: p if isinstance(p, int) else type(p).__name__)
def test_heun_is_algorithm_1_of_edm_step_by_step(schedule, steps, clip):
    def denoise(x, sigma):
        return mixture(x, sigma) if clip is None else mixture(x, sigma).clamp(-clip, clip)

    sigmas, noise = grid(schedule, steps), start_noise()
    expected = algorithm_1(denoise, noise * math.sqrt(1 + sigmas[0] ** 2), sigmas)
    found = []
    images = samplers.heun(
        as_model(mixture),
        noise,
        None,
        None,
        steps,
        schedule=schedule,
        clip=clip,
        on_step=lambda i, z: found.append((i, z)),
    )
    assert [i for i, _ in found] == list(range(steps, 0, -1))
    assert torch.equal(found[-1][1], images)
    for (_, z), x, sigma in zip(found, expected, sigmas[1:], strict=True):
        torch.testing.assert_close(z, x / math.sqrt(1 + sigma**2), rtol=1e-9, atol=1e-9)


def test_the_karras_grid_is_that_of_edm():
    """[EDM] eq. 5: from σ_max to σ_min in N levels, each asked as a step's end and as the next one's start, then 0."""
    model, steps = as_model(mixture), 18
    samplers.heun(model, start_noise(), None, None, steps, schedule=KARRAS)
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    sigmas = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)]
    asked = [sigmas[0], *(sigma for sigma in sigmas[1:] for _ in range(2))]
    assert [math.tan(angle) for angle in model.angles] == pytest.approx(asked, rel=1e-9)


def test_one_step_is_ddims():
    arguments = (as_model(mixture), start_noise(), None, None, 1)
    found, expected = (f(*arguments, schedule=KARRAS, clip=0.7) for f in (samplers.heun, samplers.ddim))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [0, -1])
def test_less_than_one_step_is_a_value_error(steps):
    with pytest.raises(ValueError, match=str(steps)):
        samplers.heun(as_model(mixture), start_noise(), None, None, steps, schedule=KARRAS)


# Gaussian data N(m, s²): D(x; σ) = m + s²/(s² + σ²)·(x − m), and the exact flow keeps (x − m)/√(s² + σ²).
MEAN, STD = 0.3, 0.5


def gaussian(x, sigma):
    return MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)


@every_schedule
@pytest.mark.parametrize("steps", [2, 3, 18, 128])
def test_gaussian_samples_are_stretched_by_the_known_factor(steps, schedule):
    """A step multiplies x − m by 1 + h·(a + a'·(1 + h·a))/2, where h = σ' − σ, a = σ/(s² + σ²); the last is D."""
    noise, factor = start_noise(), 1.0
    sigmas = grid(schedule, steps)[:-1]
    for sigma, following in pairwise(sigmas):
        h, a, b = following - sigma, sigma / (STD**2 + sigma**2), following / (STD**2 + following**2)
        factor *= 1 + h * (a + b * (1 + h * a)) / 2
    factor *= STD**2 / (STD**2 + sigmas[-1] ** 2)
    expected = MEAN + factor * (math.sqrt(1 + sigmas[0] ** 2) * noise - MEAN)
    found = samplers.heun(as_model(gaussian), noise, None, None, steps, schedule=schedule)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def error_at_the_lowest_noise(schedule, steps):
    """Of z at φ(0), against the exact flow; the last step, from there to the image, is the same for every N."""
    noise, seen = start_noise(), {}
    samplers.heun(as_model(gaussian), noise, None, None, steps + 1, schedule=schedule, on_step=seen.__setitem__)
    top, bottom = (math.tan(schedule.angle(t)) for t in (1.0, 0.0))
    unit = (noise * math.sqrt(1 + top**2) - MEAN) / math.sqrt(STD**2 + top**2)
    exact = (MEAN + math.sqrt(STD**2 + bottom**2) * unit) / math.sqrt(1 + bottom**2)
    return (seen[2] - exact).abs().max().item()


@pytest.mark.parametrize("schedule", [KARRAS, LinearBetaSchedule()], ids=lambda s: type(s).__name__)
def test_heun_converges_at_second_order_to_the_exact_flow(schedule):
    errors = [error_at_the_lowest_noise(schedule, steps) for steps in (128, 256, 512, 1024)]
    ratios = [coarse / fine for coarse, fine in pairwise(errors)]
    assert all(3.9 < ratio < 4.1 for ratio in ratios), (errors, ratios)


def test_on_the_cosine_schedule_heun_converges_too_but_from_far_away():
    """Its first step divides σ by thousands: a coarse grid is far off, and the error falls faster at first."""
    errors = [error_at_the_lowest_noise(CosineSchedule(), steps) for steps in (16, 256, 512, 1024)]
    assert errors[0] > 0.5
    assert all(coarse / fine > 3.9 for coarse, fine in pairwise(errors)), errors


@pytest.mark.parametrize("steps", [18, 256])
@every_schedule
def test_float32_is_exact_but_for_what_the_correction_multiplies(schedule, steps):
    """Rounding of x̂ is multiplied by κ = ½·(σ/σ' − 1)·cos φ', which is 47 at most but for the cosine schedule."""
    noise, seen = start_noise(dtype=torch.float32), []
    single = samplers.heun(
        lambda z, *rest: as_model(mixture)(z.double(), *rest).float(), noise, None, None, steps, schedule=schedule
    )
    double = samplers.heun(
        as_model(mixture), noise.double(), None, None, steps, schedule=schedule, on_step=lambda i, z: seen.append(z)
    )
    sigmas = grid(schedule, steps)[:-1]
    kappa = max((a / b - 1) / math.sqrt(1 + b * b) / 2 for a, b in pairwise(sigmas))
    largest = max(z.abs().max().item() for z in seen)
    assert single.dtype == torch.float32
    assert (single - double).abs().max() < 8 * 2**-24 * (1 + kappa) * (1 + largest)


class Counted(Network):
    def forward(self, z, time, label, guidance):
        return 0.1 * super().forward(z.double(), time, label, guidance)


@every_parameterization
@pytest.mark.parametrize("w", [0.0, 2.0])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_networks_are_sampled_as_their_velocities_are_and_counted(clip, w, parameterization):
    """2N − 1 calls, twice as many where guidance needs both models."""
    model, steps, label = denoiser(Counted(), parameterization=parameterization), 5, torch.tensor([0, 1, 2, 0])
    guided, guidance = Guided(model), torch.full((4,), w)
    arguments = (start_noise(), label, guidance, steps)
    expected = samplers.heun(lambda *point: guided(*point), *arguments, schedule=KARRAS, clip=clip)
    before = model.network_rows
    found = samplers.heun(guided, *arguments, schedule=KARRAS, clip=clip)
    assert model.network_rows - before == 4 * (2 * steps - 1) * (2 if w else 1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (clip is None) or found.abs().max() <= clip


def test_generate_takes_heun():
    model = randomize(Denoiser(DenoiserConfig(TINY, KARRAS, "edm")))
    (together,) = generate(model, 4, Sampling(steps=18, sampler="heun", seed=1))
    apart = torch.cat(list(generate(model, 4, Sampling(steps=18, sampler="heun", seed=1, batch_size=3))))
    assert model.network_rows == 2 * 4 * 35
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-5)
    (ddim,) = generate(model, 4, Sampling(steps=18, sampler="ddim", seed=1))
    assert together.abs().max() <= 1 and (together - ddim).abs().max() > 1e-2


# --- beside diffusers' HeunDiscreteScheduler ------------------------------------------------------------------------


def peer_trajectory(scheduler, prediction, x, alike):
    """x after each whole step, in its coordinates; the noise levels given to it in float64."""
    scheduler.sigmas = torch.tensor([alike[0], *(s for s in alike[1:-1] for _ in range(2)), 0.0], dtype=torch.float64)
    found = []
    for sigma, timestep in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        y = mixture(x, sigma)
        eps, scale = (x - y) / sigma, math.sqrt(1 + sigma**2)
        said = {"epsilon": eps, "sample": y, "v_prediction": (eps - sigma * y) / scale}[prediction]
        x = scheduler.step(said, timestep, x).prev_sample
        if scheduler.state_in_first_order:
            found.append(x)
    return [*found, x]  # its last step has no second half


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(("karras", "steps"), [(False, 10), (False, 28), (True, 18)])
def test_heun_is_diffusers_heun_discrete(karras, steps, clip, prediction):
    """Its grids "linspace" over DDPM's timesteps, and of Karras' formula between the same ends."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.HeunDiscreteScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type=prediction,
        use_karras_sigmas=karras,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )
    scheduler.set_timesteps(steps)
    schedule = LinearBetaSchedule()
    if karras:
        schedule = KarrasSchedule(*(math.tan(schedule.angle(t)) for t in (0.0, 1.0)))
    alike = grid(schedule, steps)
    theirs = [scheduler.sigmas[0], *scheduler.sigmas[1::2]]
    torch.testing.assert_close(torch.tensor(alike), torch.stack(theirs), rtol=1e-3, atol=0)
    found = []
    samplers.heun(
        as_model(mixture),
        start_noise(),
        None,
        None,
        steps,
        schedule=schedule,
        clip=clip,
        on_step=lambda i, z: found.append(z),
    )
    expected = peer_trajectory(scheduler, prediction, start_noise() * math.sqrt(1 + alike[0] ** 2), alike)
    for z, x, sigma in zip(found, expected, alike[1:], strict=True):
        torch.testing.assert_close(z, x / math.sqrt(1 + sigma**2), rtol=1e-9, atol=1e-9)


# --- the command lines ----------------------------------------------------------------------------------------------


def test_a_teacher_of_edm_is_trained_sampled_and_scored(run, extractor):
    training = ["--data", "digits", *EDM_LINE, *TINY_LINE, "--updates", 4, "--batch-size", 16, "--log-every", 1]
    result = run("teacher", *training, "--out", "o", "--device", "cpu")
    assert result.code == 0, result.err
    config = checkpoint.load("o").config
    assert (config.schedule, config.parameterization, config.sampler) == (KARRAS, "edm", "ddim")
    drawing = ["--checkpoint", "o", "--sampler", "heun", "--steps", 5, "--num", 4, "--device", "cpu"]
    for w, calls in ((0, 9), (1, 18)):
        result = run("sample", *drawing, "--guidance", w, "--out", f"w{w}.png")
        assert result.code == 0 and not result.err, result.err
        assert f"5 heun steps, {calls} network calls an image" in result.out
    assert run("evaluate", *drawing, "--guidance", 0, 1, "--out", "scores.json").code == 0
    rows = json.loads(Path("scores.json").read_text())["rows"]
    assert [(row["sampler"], row["nfe"]) for row in rows] == [("heun", 9), ("heun", 18)]
    result = run("teacher", *training, "--noise-levels", "schedule", "--out", "o", "--device", "cpu", "--resume")
    assert_refused(result, "--noise-levels was lognormal, is schedule")


def test_the_options_reach_the_loss(run, monkeypatch):
    """The first update's loss, before anything is learned, is that of the function."""
    seen = []
    loss = regression.teacher

    def watched(*arguments, **options):
        seen.append(options)
        return loss(*arguments, **options)

    monkeypatch.setattr(regression, "teacher", watched)
    line = ["--data", "digits", *TINY_LINE, "--updates", 1, "--batch-size", 8, "--device", "cpu"]
    assert run("teacher", *line, *EDM_LINE, "--out", "a").code == 0
    assert run("teacher", *line, "--out", "b").code == 0
    assert [(o["weight"], o["noise_levels"]) for o in seen] == [("edm", "lognormal"), ("snr", "schedule")]


@pytest.mark.parametrize(
    "wrong", [["--noise-levels", "normal"], ["--weight", "lambda"], ["--parameterization", "edm2"]]
)
def test_unknown_choices_are_refused(run, wrong):
    result = run("teacher", *wrong, "--out", "o")
    assert result.code == 2 and wrong[1] in result.err and "Traceback" not in result.err
    assert not Path("o").exists()


def test_the_preset_has_the_published_network_and_settings(run, tmp_path):
    """55.7 M parameters; 200 M images in batches of 512."""
    write_images(tmp_path / "images", size=(32, 32), count=8)
    line = ["--preset", "cifar10-edm", "--data", "images", "--out", "o", "--device", "cpu"]
    result = run("teacher", *line, "--batch-size", 4, "--dry-run")
    assert result.code == 0, result.err
    assert "55.73 M parameters" in result.out or "55.74 M parameters" in result.out
    assert "updates      390625" in result.out


def test_heun_on_the_cosine_schedule_is_warned_of(run, tmp_path):
    checkpoint.save(tmp_path / "cosine", randomize(Denoiser(DenoiserConfig(TINY))))
    checkpoint.save(tmp_path / "linear", randomize(Denoiser(DenoiserConfig(TINY, LinearBetaSchedule()))))
    for name, warned in (("cosine", True), ("linear", False)):
        line = ["--checkpoint", name, "--steps", 2, "--num", 2, "--device", "cpu", "--overwrite"]
        result = run("sample", *line, "--sampler", "heun")
        assert result.code == 0 and ("warning: heun" in result.err) == warned
        assert "warning" not in run("sample", *line).err


def test_a_student_is_sampled_with_heun_only_by_force(run, tmp_path):
    student = DenoiserConfig(TINY, kind="stage2", steps=2)
    checkpoint.save(tmp_path / "student", Denoiser(student))
    line = ["--checkpoint", "student", "--sampler", "heun", "--num", 2, "--device", "cpu"]
    assert_refused(run("sample", *line), "--sampler heun", "student", "the ddim sampler", "--force")
    assert "2 heun steps, 3 network calls" in run("sample", *line, "--force").out
    assert_refused(run("sample", *line, "--steps", 0), "--steps must be positive")
