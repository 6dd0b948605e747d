"""What `train.sid` refuses, before any long work."""

import math
import re
from pathlib import Path

import command_lines
import pytest
from command_lines import assert_refused
from sid_runs import make_options, train

from fastdiff import checkpoint
from fastdiff.errors import UserError
from train import begin
from train import sid as recipe

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")

SENSELESS = [
    ({"alpha": 0.0}, "--alpha"),
    ({"alpha": -1.0}, "--alpha"),
    ({"alpha": 2.1}, "--alpha"),
    ({"alpha": math.nan}, "--alpha"),
    ({"guidance_t_max": -1.0}, "--guidance-t-max"),
    ({"guidance_t_max": math.nan}, "--guidance-t-max"),
    ({"t_max": 0.0}, "--t-max"),
    ({"t_max": 1001.0}, "--t-max"),
    ({"t_max": math.nan}, "--t-max"),
    ({"sigma_min": 0.0}, "--sigma-min"),
    ({"sigma_min": 80.0}, "--sigma-min"),
    ({"sigma_min": math.nan}, "--sigma-min"),
    ({"sigma_max": math.inf}, "--sigma-max"),
    ({"sigma_max": 0.001}, "--sigma-max"),
    ({"sigma_init": 0.0}, "--sigma-init"),
    ({"sigma_init": -2.5}, "--sigma-init"),
    ({"sigma_init": math.inf}, "--sigma-init"),
    ({"sigma_init": math.nan}, "--sigma-init"),
    ({"fake_lr": 0.0}, "--fake-lr"),
    ({"fake_lr": -1e-3}, "--fake-lr"),
    ({"fake_lr": math.nan}, "--fake-lr"),
    ({"score_num": 1}, "--score-num"),
    ({"score_num": 0}, "--score-num"),
    ({"class_frequencies": (0.0,) * 10}, "--class-frequencies"),
    ({"class_frequencies": (1.0,) * 9 + (-1.0,)}, "--class-frequencies"),
    ({"class_frequencies": (1.0,) * 9 + (math.inf,)}, "--class-frequencies"),
    ({"class_frequencies": (1.0,) * 9 + (math.nan,)}, "--class-frequencies"),
    ({"class_frequencies": (1.0,) * 9}, "--class-frequencies has 9 numbers"),
    ({"accumulate": 3}, "--accumulate"),
    ({"ema": 1.0}, "--ema"),
    ({"batch_size": 0}, "--batch-size"),
    ({"device": "tpu"}, "--device"),
    ({"resume": True, "overwrite": True}, "--resume"),
    ({"data": "nowhere"}, "nowhere"),
    ({"guidance_range": (0.0, 1.0)}, "--guidance-range"),
]


@pytest.mark.parametrize(("changes", "message"), SENSELESS, ids=lambda value: str(value)[:40])
def test_options_without_sense_are_refused_before_anything_is_made(models, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(models / "teacher", tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_class_frequencies_of_an_unconditional_teacher_are_refused(models, tmp_path):
    with pytest.raises(UserError, match=r"--class-frequencies has 1 numbers, but .* has 0 classes"):
        train(models / "unconditional", tmp_path / "run", class_frequencies=(1.0,))


@pytest.mark.parametrize("limits", [(0.0, 4.1), (-0.1, 4.0), (3.0, 1.0), (math.nan, 1.0)])
def test_strengths_that_the_teacher_does_not_know_are_refused(models, tmp_path, limits):
    with pytest.raises(UserError, match="--guidance-range"):
        train(models / "guided", tmp_path / "run", guidance_range=limits)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{"guidance_t_max": 799.0}, {"t_max": 500.0, "guidance_t_max": 400.0}])
def test_guidance_that_ends_needs_a_teacher_that_knows_none(models, tmp_path, options):
    with pytest.raises(UserError, match=r"--guidance-t-max .* w = 0"):
        train(models / "one strength", tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    for name, taken in (("guided", options), ("one strength", {"t_max": 500.0, "guidance_t_max": 500.0})):
        recipe.check_teacher(make_options(models / name, **taken), checkpoint.load(models / name))


@pytest.mark.parametrize("kind", ["stage2", "encoder", "two_student", "sid"])
def test_teachers_of_another_kind_are_refused(models, tmp_path, kind):
    with pytest.raises(UserError, match=f"{kind} is {begin.MODELS[kind]}, and train.sid takes a stage-1 model"):
        train(models / kind, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_of_other_images_are_refused(models, tmp_path):
    images = command_lines.write_images(tmp_path / "images")
    with pytest.raises(UserError, match="3×8×8"):
        train(models / "teacher", tmp_path / "run", data=str(images))
    assert not (tmp_path / "run").exists()


REFUSED = [
    (["--teacher", "nowhere"], ["nowhere"]),
    (["--teacher", "{teacher}", "--alpha", "0"], ["--alpha"]),
    (["--teacher", "{teacher}", "--t-max", "2000"], ["--t-max"]),
    (["--teacher", "{linear}", "--sigma-min", "0.003"], ["0.003 to 0.01", "--sigma-min"]),
    (["--teacher", "{stage2}"], ["a stage-2 model", "takes a stage-1 model"]),
    (["--teacher", "{teacher}", "--guidance-range", "0", "4"], ["--guidance-range", "train.stage1"]),
    (["--teacher", "{teacher}", "--class-frequencies", "1", "2"], ["--class-frequencies", "2 numbers", "10 classes"]),
    (["--teacher", "{teacher}", "--data", "nowhere"], ["nowhere", "only score", "--data None"]),
    (["--teacher", "{teacher}", "--preset", "cifar11"], ["cifar11", "cifar10", "afhqv2-64"]),
]


@pytest.mark.parametrize(("arguments", "parts"), REFUSED, ids=lambda value: " ".join(value)[:50])
def test_mistakes_on_the_command_line_give_one_sentence(run, models, arguments, parts):
    arguments = [
        re.sub(r"\{(.*)\}", lambda found: str(models / found[1]), argument)
        for argument in [*arguments, "--out", "o", "--device", "cpu"]
    ]
    assert_refused(run("sid", *arguments), *parts)
    assert_refused(run("fastdiff", "sid", *arguments), *parts)
    assert not Path("o").exists()
