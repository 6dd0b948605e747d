"""Samplers beside diffusers' schedulers, step by step in float64, on DDPM's linear schedule of 1000 timesteps.

Compared: `samplers.ancestral` with DDPMScheduler (γ = 0 is its variance "fixed_small", γ = 1 "fixed_large", γ between
"learned_range" with a network that always says 2γ − 1), `samplers.ddim` with DDIMScheduler and `samplers.encode` with
DDIMInverseScheduler. Grids agree in two ways: `LinearBetaSchedule` in 999 steps visits timesteps 999, 998, ..., 1; and
a schedule made of a peer's own few timesteps gives its grid. The peers' formulas are run as they are, on ᾱ computed in
float64, as float32 is not exact enough to compare with; both add the same noise. DDPMScheduler adds noise even in its
last step, where that starts above timestep 0, so the x̂ of the last steps is compared.
"""

import math

import pytest
import torch

import kernels
from fastdiff import rotation, samplers
from fastdiff.schedule import LinearBetaSchedule

diffusers = pytest.importorskip("diffusers")
ALPHA_BAR = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
LINEAR = LinearBetaSchedule()
SEED, SHAPE = 5, (2, 3, 4, 4)
same = {"rtol": 1e-9, "atol": 1e-9}
predictions = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])


def peer(name, **options):
    """A scheduler of diffusers without clipping, its table of ᾱ in float64."""
    fields = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}
    scheduler = getattr(diffusers, name)(**fields | options)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), ALPHA_BAR, rtol=1e-4, atol=0)
    scheduler.alphas_cumprod = ALPHA_BAR
    if name == "DDIMInverseScheduler":
        scheduler.initial_alpha_cumprod = ALPHA_BAR[0]  # as with set_alpha_to_one=False
    return scheduler


class AtTimesteps:
    """The schedule with φ(i/N) = arccos √ᾱ at the i-th of a list of timesteps, cleanest first; φ(0) is for encoders."""

    def __init__(self, timesteps):
        self.timesteps = timesteps

    def angle(self, t):
        alpha_bar = ALPHA_BAR[self.timesteps[round(t * (len(self.timesteps) - 1))]]
        return math.atan2((1 - alpha_bar).sqrt(), alpha_bar.sqrt())


def predicted_noise(z, cos, sin):
    """E[ε | z] of two Gaussians at ±0.6, of deviation 0.3 each, in every pixel alone."""
    variance = (0.3 * cos) ** 2 + sin**2
    mean = 0.6 * torch.tanh(0.6 * cos * z / variance)
    return sin * (z - cos * mean) / variance


def model(z, angle, label, guidance):
    cos, sin = (f(angle)[:, None, None, None] for f in (torch.cos, torch.sin))
    return (predicted_noise(z, cos, sin) - sin * z) / cos


def output(prediction, z, alpha_bar):
    """What a network of the peer's says to z at noise level ᾱ."""
    cos, sin = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    eps = predicted_noise(z, cos, sin)
    return {"epsilon": eps, "sample": (z - sin * eps) / cos, "v_prediction": (eps - sin * z) / cos}[prediction]


def stream(step):
    ids = torch.arange(SHAPE[0])
    return kernels.randn(SHAPE, seed=SEED, sample_ids=ids, step=step, device="cpu").double()


@pytest.fixture
def feed(monkeypatch):
    """feed(noise): what DDPMScheduler adds next."""
    queue = []
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, **_: queue.pop().expand(shape)
    )
    return lambda noise: queue.__setitem__(slice(None), [noise])


VARIANCES = {0.0: "fixed_small", 0.3: "learned_range", 1.0: "fixed_large"}
gammas = pytest.mark.parametrize("gamma", VARIANCES)


def ddpm_trajectory(scheduler, timesteps, gamma, prediction, feed):
    """[(i, z after step i)], the last with x̂ for z; step i = N..1 is the one from timesteps[N − i]."""
    z, trajectory = stream(0), []
    for i, timestep in zip(range(len(timesteps), 0, -1), timesteps, strict=True):
        said = output(prediction, z, ALPHA_BAR[timestep])
        if scheduler.config.variance_type == "learned_range":
            said = torch.cat([said, torch.full_like(said, 2 * gamma - 1)], dim=1)
        feed(stream(i))
        step = scheduler.step(said, timestep, z)
        z = step.prev_sample if i > 1 else step.pred_original_sample
        trajectory.append((i, z))
    return trajectory


def assert_same_trajectory(found, expected):
    assert [i for i, _ in found] == [i for i, _ in expected]
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **same)


def reported(sampler, start, steps, schedule, **options):
    found = []
    sampler(model, start, None, None, steps, schedule=schedule, on_step=lambda *step: found.append(step), **options)
    return found


@gammas
@predictions
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ancestral_is_diffusers_ddpm_in_twenty_steps(spacing, clip, prediction, gamma, feed):
    scheduler = peer(
        "DDPMScheduler",
        prediction_type=prediction,
        variance_type=VARIANCES[gamma],
        timestep_spacing=spacing,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )
    scheduler.set_timesteps(20)
    timesteps = scheduler.timesteps.tolist()
    assert (timesteps[0], timesteps[-1]) == {"leading": (950, 0), "trailing": (999, 49)}[spacing]
    expected = ddpm_trajectory(scheduler, timesteps, gamma, prediction, feed)
    schedule = AtTimesteps([0, *reversed(timesteps)])  # φ(0) stands for nothing: samplers end at 0
    found = reported(samplers.ancestral, stream(0), 20, schedule, variance=gamma, clip=clip, seed=SEED)
    assert_same_trajectory(found, expected)


def test_ancestral_is_diffusers_ddpm_at_every_timestep_of_the_linear_schedule(feed):
    scheduler = peer("DDPMScheduler", variance_type="fixed_large")
    expected = ddpm_trajectory(scheduler, range(999, 0, -1), 1.0, "epsilon", feed)
    assert_same_trajectory(reported(samplers.ancestral, stream(0), 999, LINEAR, variance=1.0, seed=SEED), expected)


def test_ancestral_returns_what_diffusers_does_after_timestep_zero(feed):
    """Its last step from timestep 0 adds no noise, so there prev_sample is x̂."""
    scheduler = peer("DDPMScheduler")
    scheduler.set_timesteps(10)
    z = stream(0)
    for i, timestep in zip(range(10, 0, -1), scheduler.timesteps.tolist(), strict=True):
        feed(stream(i))
        z = scheduler.step(output("epsilon", z, ALPHA_BAR[timestep]), timestep, z).prev_sample
    schedule = AtTimesteps([0, *reversed(scheduler.timesteps.tolist())])
    found = samplers.ancestral(model, stream(0), None, None, 10, schedule=schedule, variance=0.0, seed=SEED)
    torch.testing.assert_close(found, z, **same)


@gammas
@pytest.mark.parametrize("stride", [1, 7, 100])
def test_ancestral_coefficients_are_diffusers_at_all_timesteps(stride, gamma, feed):
    """A step is linear in (z, x̂, noise): from three unit inputs it puts out its three coefficients."""
    scheduler = peer("DDPMScheduler", variance_type=VARIANCES[gamma], prediction_type="sample")
    scheduler.previous_timestep = lambda t: t - stride
    z, x, noise = torch.eye(3, dtype=torch.float64)[:, None, None, None, :]
    timesteps = range(stride, 1000)
    said = x if gamma in (0, 1) else torch.cat([x, torch.full_like(x, 2 * gamma - 1)], dim=1)
    expected = []
    for t in timesteps:
        feed(noise)
        expected.append(scheduler.step(said, t, z).prev_sample.flatten())
    start, end = (LINEAR.angle(torch.tensor(t, dtype=torch.float64) / 999) for t in (timesteps, range(1000 - stride)))
    found = rotation.ancestral(start, end, gamma)
    torch.testing.assert_close(torch.stack(found, 1), torch.stack(expected), rtol=1e-9, atol=1e-12)


def test_ddim_is_diffusers_at_every_timestep_of_the_linear_schedule():
    scheduler = peer("DDIMScheduler")
    scheduler.set_timesteps(1000)
    z, expected = stream(0), []
    for timestep in range(999, 0, -1):
        step = scheduler.step(output("epsilon", z, ALPHA_BAR[timestep]), timestep, z)
        z = step.prev_sample if timestep > 1 else step.pred_original_sample
        expected.append((timestep, z))
    assert_same_trajectory(reported(samplers.ddim, stream(0), 999, LINEAR), expected)


def inverse_trajectory(scheduler, timesteps, z, prediction):
    """[(i, z at timesteps[i])] for i = 1.. upward; the peer is told where a step ends, the network where it starts."""
    trajectory = []
    for i in range(1, len(timesteps)):
        said = output(prediction, z, ALPHA_BAR[timesteps[i - 1]])
        z = scheduler.step(said, timesteps[i], z).prev_sample
        trajectory.append((i, z))
    return trajectory


@predictions
@pytest.mark.parametrize("steps", [10, 50])
def test_encoder_is_diffusers_inverse_ddim(steps, prediction):
    """From timestep 0 on: the peer's first step, from an image to timestep 0, changes nothing in its noise level."""
    scheduler = peer("DDIMInverseScheduler", prediction_type=prediction, set_alpha_to_one=False)
    scheduler.set_timesteps(steps)
    timesteps, x = scheduler.timesteps.tolist(), stream(1).clamp(-1, 1)
    assert timesteps[:2] == [0, 1000 // steps]
    idle = scheduler.step(output(prediction, x, ALPHA_BAR[0]), 0, x).prev_sample
    torch.testing.assert_close(idle, x, **same)
    expected = inverse_trajectory(scheduler, timesteps, x, prediction)
    assert_same_trajectory(reported(samplers.encode, x, steps - 1, AtTimesteps(timesteps)), expected)


def test_encoder_is_diffusers_inverse_ddim_at_every_timestep_of_the_linear_schedule():
    scheduler = peer("DDIMInverseScheduler", set_alpha_to_one=False)
    scheduler.set_timesteps(1000)
    x = stream(1).clamp(-1, 1)
    expected = inverse_trajectory(scheduler, range(1000), x, "epsilon")
    assert_same_trajectory(reported(samplers.encode, x, 999, LINEAR), expected)
