"""Noise levels that SiD draws from, and those that its teacher knows."""

import command_lines
import pytest
import torch
from common import TINY
from sid_runs import make_options, train

from fastdiff import checkpoint, samplers
from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.errors import UserError
from fastdiff.schedule import KarrasSchedule, LinearBetaSchedule, ScaledLinearSchedule
from train import sid as recipe

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


@pytest.mark.parametrize(
    ("teacher", "changes", "parts"),
    [
        ("linear", {"sigma_min": 0.003}, ["0.003 to 0.01 ", "--sigma-min"]),
        ("edm", {"sigma_min": 0.001}, ["0.001 to 0.002 ", "--sigma-min"]),
        ("edm", {"sigma_max": 100.0, "t_max": 1000.0}, ["80 to 100 ", "--sigma-max"]),
        ("edm", {"sigma_init": 90.0}, ["80 to 90 ", "--sigma-init"]),
        (
            "linear",
            {"sigma_min": 0.001, "sigma_max": 1000.0, "t_max": 1000.0},
            ["0.001 to 0.01 ", "157 to 1e+03 ", "--sigma-min", "--t-max"],
        ),
    ],
)
def test_noise_levels_that_the_teacher_lacks_are_named(models, tmp_path, teacher, changes, parts):
    with pytest.raises(UserError) as caught:
        train(models / teacher, tmp_path / "run", **changes)
    for part in parts:
        assert part in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sigma_init", [1e-4, 0.005])
def test_a_start_below_what_the_teacher_knows_is_refused(models, tmp_path, sigma_init):
    """The generator's first noise level is one that it was never trained at, whatever the loss draws."""
    with pytest.raises(UserError, match="--sigma-init"):
        train(models / "linear", tmp_path / "run", sigma_min=0.0101, sigma_init=sigma_init)


@pytest.mark.parametrize(
    ("teacher", "changes"),
    [
        ("linear", {"sigma_min": 0.0101}),
        ("linear", {}),
        ("linear", {"t_max": 1000.0}),
        ("edm", {}),
        ("edm", {"t_max": 1000.0}),
        ("edm", {"sigma_max": 100.0, "t_max": 800.0}),
        ("edm", {"sigma_init": 80.0}),
    ],
)
def test_noise_levels_that_the_teacher_knows_are_taken(models, teacher, changes):
    made = checkpoint.load(models / teacher)
    options = make_options(models / teacher, **changes)
    options.check()
    recipe.check_teacher(options, made)
    assert recipe.generator_config(options, made).sigma_init == options.sigma_init


@pytest.mark.parametrize(
    ("schedule", "limits", "said"),
    [
        (LinearBetaSchedule(), (0.01, 80), "--sigma-min is 0.01 instead of 0.002"),
        (ScaledLinearSchedule(), (0.02917, 14.615), "--sigma-max is 14.6 instead of 80"),
        (KarrasSchedule(), (0.002, 80), ""),
    ],
)
def test_the_default_range_is_cut_to_the_teachers(capsys, schedule, limits, said):
    teacher = Denoiser(DenoiserConfig(TINY, schedule))
    options = make_options("teacher")
    recipe.check_teacher(options, teacher)
    found = recipe.noise_levels(options, teacher)
    assert (found.sigma_min, found.sigma_max) == pytest.approx(limits, rel=1e-3)
    assert said in (warned := capsys.readouterr().err) and bool(warned) == bool(said)


def test_a_linear_beta_teacher_learns_above_its_lowest_level(models, tmp_path, monkeypatch):
    seen, real = [], samplers.denoised

    def spy(model, z, angle, *arguments):
        seen.append(torch.tan(angle).min())
        return real(model, z, angle, *arguments)

    monkeypatch.setattr(samplers, "denoised", spy)
    model = train(models / "linear", tmp_path / "run", sigma_min=0.0101, updates=2, batch_size=64)
    assert min(seen) >= 0.0101 * (1 - 1e-9)
    assert all(value.isfinite().all() for value in model.parameters())
    assert model.schedule == LinearBetaSchedule() and model.config.parameterization == "eps"
