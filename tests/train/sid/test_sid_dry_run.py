"""What SiD would do, and what its presets say."""

import re
from pathlib import Path

import command_lines
import pytest
from sid_runs import make_options

from fastdiff import checkpoint
from train import begin, commands
from train import sid as recipe

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


@pytest.mark.parametrize(
    "extra", [[], ["--data", "digits"], ["--accumulate", "4"], ["--preset", "digits"]], ids=" ".join
)
def test_a_dry_run_says_what_would_be_done_and_does_nothing(run, runs, extra):
    result = run(
        "sid", *extra, "--teacher", runs.stage1, "--out", "o", "--device", "cpu", "--updates", "70", "--dry-run"
    )
    assert result.code == 0 and not result.err, result.err
    assert re.search(r"model +([\d.]+) M parameters, images 1×8×8", result.out)
    assert re.search(r"updates +70 of each network, 128 images each", result.out)
    assert re.search(r"memory +about [\d.]+ GiB", result.out) and not Path("o").exists()


def test_a_dry_run_counts_what_an_update_holds(runs, capsys):
    """Two networks that learn with gradients and two moments, an average, a frozen teacher, and three passes."""
    options = make_options(runs.stage1, dry_run=True, batch_size=512, ema=0.9)
    assert recipe.train(options) is None
    config = checkpoint.load(runs.stage1).config
    weights = sum(p.numel() for p in checkpoint.load(runs.stage1).parameters())
    expected = 4 * (2 * 4 + 1 + 1) * weights + begin.activation_bytes(config, 3 * 512, options)
    found = float(re.search(r"memory +about ([\d.e-]+) GiB", capsys.readouterr().out)[1])
    assert found == pytest.approx(expected / 2**30, rel=0.01)


@pytest.mark.parametrize(
    ("preset", "parts"),
    [
        ("cifar10", ["256", "1e-05", "390625", "bf16"]),
        ("imagenet64", ["8192", "4e-06", "bf16"]),
        ("ffhq64", ["512", "1e-05", "0.9 0.999"]),
        ("afhqv2-64", ["512", "5e-06"]),
    ],
)
def test_presets_hold_the_published_settings(run, preset, parts):
    text = run("sid", "--preset", preset, "--help").out
    for part in parts:
        assert f"(default: {part})" in text, part
    assert set(recipe.PRESETS) == {"digits", "fashion-mnist", "cifar10", "imagenet64", "ffhq64", "afhqv2-64"}


def test_alpha_and_noise_levels_of_the_published_presets():
    published = ("cifar10", "imagenet64", "ffhq64", "afhqv2-64")
    alphas = [recipe.PRESETS[name].get("alpha", recipe.Options.alpha) for name in published]
    assert alphas == [1.2, 1.2, 1.2, 1.0]
    for name in published:
        assert not {"t_max", "sigma_init", "sigma_min", "sigma_max", "guidance_t_max"} & recipe.PRESETS[name].keys()
    defaults = recipe.Options
    assert (defaults.t_max, defaults.sigma_init, defaults.sigma_min, defaults.sigma_max) == (800, 2.5, 0.002, 80)
    assert defaults.guidance_t_max >= 1000  # guidance everywhere


def test_the_command_is_known():
    assert commands.COMMANDS["sid"][0] == "train.sid"
