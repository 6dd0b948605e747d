"""`fastdiff.sample` and `fastdiff.evaluate`: the sampler a checkpoint was trained for, w as list, range and sweep."""

import json
import re
from dataclasses import replace
from pathlib import Path

import command_lines
import numpy as np
import pytest
from command_lines import assert_refused
from common import TINY, randomize
from PIL import Image

from fastdiff import checkpoint
from fastdiff.denoiser import Denoiser, DenoiserConfig

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")

LIMITS = (0.0, 4.0)
MODELS = {
    "teacher": {},
    "stage1": {"kind": "stage1", "guidance_range": LIMITS},
    "deterministic": {"kind": "stage2", "guidance_range": LIMITS, "steps": 4},
    "stochastic": {"kind": "stage2", "guidance_range": LIMITS, "steps": 4, "sampler": "stochastic"},
    "encoder": {"kind": "encoder", "guidance_range": LIMITS, "steps": 4, "sampler": "encode"},
    "two": {"kind": "two_student", "steps": 4},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a checkpoint of random weights for each name: labels and w matter to all of them."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        save_model(folder / name, **config)
    save_model(folder / "unlabelled", unet=replace(TINY, num_classes=0))
    return folder


def save_model(folder, *, unet=None, **config):
    unet = unet or replace(TINY, guidance_input=config.get("guidance_range") is not None)
    checkpoint.save(folder, randomize(Denoiser(DenoiserConfig(unet, **config)), scale=0.2))


@pytest.fixture
def sample(run, models):
    def sample_(name, *arguments):
        return run("sample", "--checkpoint", models / name, "--device", "cpu", *arguments)

    return sample_


@pytest.fixture
def draw(sample, tmp_path):
    """Pictures (images, 8, 8) uint8 and the line printed."""
    counter = iter(range(1000))

    def draw_(name, *arguments):
        folder = tmp_path / f"drawn-{next(counter)}"
        result = sample(name, "--out", folder, *arguments)
        assert result.code == 0, result.err
        pictures = [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]
        return np.stack(pictures), result.out.splitlines()[-1]

    return draw_


def calls(line):
    return float(re.search(r"([\d.]+) network calls an image", line)[1])


def assert_same(pictures, others):
    """But for rounding to a neighbouring byte: networks add up in another order in batches of another size."""
    assert pictures.shape == others.shape
    assert np.abs(pictures.astype(int) - others).max() <= 1


# --- samplers ---


@pytest.mark.parametrize(
    ("name", "sampler", "steps", "count"),
    [
        ("teacher", "ddim", 64, 128),
        ("stage1", "ddim", 64, 64),
        ("deterministic", "ddim", 4, 4),
        ("stochastic", "stochastic", 4, 4),
        ("two", "ddim", 4, 8),
    ],
)
def test_sampler_and_steps_are_those_of_the_checkpoint(draw, name, sampler, steps, count):
    """N steps are N calls; twice as many for a model without guidance inside, at w > 0."""
    pictures, line = draw(name, "--num", 4, "--guidance", 1)
    assert f"in {steps} {sampler} steps" in line and calls(line) == count
    chosen, _ = draw(name, "--num", 4, "--guidance", 1, "--sampler", sampler, "--steps", steps)
    assert (pictures == chosen).all()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_stochastic_step_is_one_call(draw, steps):
    assert calls(draw("stage1", "--num", 3, "--sampler", "stochastic", "--steps", steps, "--guidance", 2)[1]) == steps
    assert calls(draw("teacher", "--num", 3, "--sampler", "stochastic", "--steps", steps)[1]) == steps
    line = draw("teacher", "--num", 3, "--sampler", "ancestral", "--steps", steps, "--guidance", 2)[1]
    assert calls(line) == 2 * steps


@pytest.mark.parametrize(
    ("name", "trained", "other"),
    [
        ("stochastic", "stochastic", "ddim"),
        ("stochastic", "stochastic", "ancestral"),
        ("deterministic", "ddim", "stochastic"),
        ("deterministic", "ddim", "ancestral"),
        ("two", "ddim", "stochastic"),
    ],
)
def test_a_sampler_that_a_student_was_not_trained_for_needs_force(run, sample, models, name, trained, other):
    result = sample(name, "--sampler", other, "--num", 4)
    assert_refused(result, f"--sampler {other}", models / name, f"the {trained} sampler", "--force")
    result = run("evaluate", "--checkpoint", models / name, "--sampler", other, "--num", 4, "--device", "cpu")
    assert_refused(result, f"--sampler {other}", models / name, f"the {trained} sampler", "--force")
    assert not Path("grid.png").exists() and not Path("results.json").exists()
    result = sample(name, "--sampler", other, "--num", 4, "--force")
    assert result.code == 0 and f"4 {other} steps" in result.out and Path("grid.png").is_file()


def test_undistilled_models_take_every_sampler(draw):
    for name in ("teacher", "stage1"):
        drawn = [draw(name, "--num", 4, "--sampler", s, "--steps", 4)[0] for s in ("ddim", "stochastic", "ancestral")]
        assert all((a != b).any() for a, b in [(drawn[0], drawn[1]), (drawn[1], drawn[2]), (drawn[0], drawn[2])])


@pytest.mark.parametrize("options", [[], ["--force"], ["--sampler", "ddim", "--force"], ["--sampler", "stochastic"]])
def test_an_encoder_makes_no_images(run, sample, models, options):
    assert_refused(sample("encoder", *options), models / "encoder", "is an encoder", "fastdiff.translate")
    result = run("evaluate", "--checkpoint", models / "encoder", "--device", "cpu", *options)
    assert_refused(result, models / "encoder", "is an encoder")


def test_variance_is_that_of_the_ancestral_sampler(draw):
    def drawn(*arguments):
        return draw("teacher", "--sampler", "ancestral", "--num", 6, "--steps", 4, *arguments)[0]

    assert (drawn() == drawn("--variance", 0.3)).all()
    assert (drawn("--variance", 0) != drawn("--variance", 1)).any()
    ddim = [draw("teacher", "--num", 6, "--steps", 4, "--variance", g)[0] for g in (0, 1)]
    assert (ddim[0] == ddim[1]).all()


@pytest.mark.parametrize("value", [-0.1, 1.5, "nan"])
@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_variance_outside_its_range_is_refused(run, models, command, value):
    line = ["--checkpoint", models / "teacher", "--sampler", "ancestral", "--variance", value, "--device", "cpu"]
    assert_refused(run(command, *line), "--variance", "[0, 1]", value)
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("sampler", ["stochastic", "ancestral"])
def test_noise_in_between_does_not_depend_on_the_batch(draw, sampler):
    given = ["--num", 7, "--guidance", 0, 2, "--sampler", sampler, "--steps", 4, "--seed", 5]
    whole, _ = draw("stage1", *given)
    for size in (1, 3, 6):
        assert_same(draw("stage1", *given, "--batch-size", size)[0], whole)
    assert len({picture.tobytes() for picture in whole}) == 7
    more, _ = draw("stage1", *given, "--num", 9)
    assert_same(more[:7], whole)
    assert (draw("stage1", *given, "--seed", 6)[0] != whole).any()


def test_evaluate_takes_the_checkpoints_sampler(run, models, extractor):
    def rows(name, *arguments):
        line = ["--num", 20, "--guidance", 0, 1, "--device", "cpu", "--out", "r.json", "--overwrite", *arguments]
        result = run("evaluate", "--checkpoint", models / name, *line)
        assert result.code == 0, result.err
        return json.loads(Path("r.json").read_text())["rows"]

    found = rows("stochastic")
    assert [(row["sampler"], row["steps"], row["nfe"]) for row in found] == [("stochastic", 4, 4)] * 2
    forced = rows("stochastic", "--sampler", "ddim", "--force")
    assert [(row["sampler"], row["nfe"]) for row in forced] == [("ddim", 4)] * 2
    assert all(a["fd"] != b["fd"] for a, b in zip(found, forced, strict=True))
    ancestral = rows("teacher", "--sampler", "ancestral", "--steps", 4)
    assert [(row["sampler"], row["nfe"]) for row in ancestral] == [("ancestral", 4), ("ancestral", 8)]
    assert ancestral[0]["fd"] != rows("teacher", "--sampler", "ancestral", "--steps", 4, "--variance", 1)[0]["fd"]


# --- w: list, range, sweep ---


@pytest.mark.parametrize("name", ["deterministic", "stochastic", "teacher"])
def test_a_list_of_strengths_goes_round(draw, name):
    given = ["--num", 7, "--labels", 3, "--steps", 4, "--batch-size", 4]
    mixed, _ = draw(name, "--guidance", 0, 1, 4, *given)
    alone = [draw(name, "--guidance", w, *given)[0] for w in (0, 1, 4)]
    assert (alone[0] != alone[2]).any()
    assert_same(mixed, np.stack([alone[index % 3][index] for index in range(7)]))


def test_a_range_of_strengths_is_spread_over_the_images(draw):
    spread, _ = draw("deterministic", "--guidance-range", 1, 3, "--num", 5)
    assert_same(spread, draw("deterministic", "--guidance", 1, 1.5, 2, 2.5, 3, "--num", 5)[0])
    falling, _ = draw("deterministic", "--guidance-range", 3, 1, "--num", 5)
    assert_same(falling, draw("deterministic", "--guidance", 3, 2.5, 2, 1.5, 1, "--num", 5)[0])
    one, _ = draw("deterministic", "--guidance-range", 2, 2, "--num", 5)
    assert_same(one, draw("deterministic", "--guidance", 2, "--num", 5)[0])
    first, _ = draw("deterministic", "--guidance-range", 1, 3, "--num", 1)
    assert_same(first, draw("deterministic", "--guidance", 1, "--num", 1)[0])


@pytest.mark.parametrize("name", ["deterministic", "stochastic", "teacher"])
@pytest.mark.parametrize("labels", [[], ["--labels", 2, 5]])
def test_a_sweep_is_one_row_a_strength_with_noise_and_class_of_its_column(draw, name, labels):
    given = ["--num", 6, "--steps", 4, "--seed", 3, *labels]
    rows, line = draw(name, "--guidance", 0, 1.5, 4, "--sweep", *given)
    assert line.startswith("18 images in 4 ")
    assert rows.shape == (18, 8, 8)
    for row, w in zip(rows.reshape(3, 6, 8, 8), (0, 1.5, 4), strict=True):
        assert_same(row, draw(name, "--guidance", w, *given)[0])
    assert (rows[:6] != rows[6:12]).any() and (rows[6:12] != rows[12:]).any()


def test_the_grid_of_a_sweep_has_a_row_for_each_strength(sample, draw):
    given = ["--num", 6, "--batch-size", 4]
    assert sample("deterministic", "--guidance", 0, 2, 4, "--sweep", *given, "--out", "sweep.png").code == 0
    with Image.open("sweep.png") as picture:  # 8 pixels enlarged 3 times, 1 pixel between
        assert picture.size == (6 * 25 + 1, 3 * 25 + 1)
        pixels = np.asarray(picture)[..., 0]
    for row, w in enumerate((0, 2, 4)):
        tiles = [pixels[1 + 25 * row : 25 + 25 * row : 3, 1 + 25 * i : 25 + 25 * i : 3] for i in range(6)]
        assert_same(np.stack(tiles), draw("deterministic", "--guidance", w, *given)[0])


def test_a_sweep_of_one_strength_is_one_row(sample, draw):
    assert sample("deterministic", "--guidance", 2, "--sweep", "--num", 12).code == 0
    with Image.open("grid.png") as picture:
        assert picture.size == (12 * 25 + 1, 25 + 1)


def test_a_sweep_does_not_depend_on_the_batch(draw):
    given = ["--guidance", 0, 3, "--sweep", "--num", 5]
    whole, _ = draw("stochastic", *given)
    for size in (1, 3, 7):
        assert_same(draw("stochastic", *given, "--batch-size", size)[0], whole)


# --- mistakes ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--guidance", 3, "--guidance-range", 0, 4], ["--guidance", "--guidance-range", "one of them"]),
        (["--sweep", "--guidance-range", 0, 4], ["--sweep", "--guidance-range", "list them"]),
        (["--sweep", "--guidance", 0, -1], ["--guidance", "-1"]),
        (["--sweep", "--guidance"], ["--guidance", "at least one"]),
        (["--guidance"], ["--guidance", "at least one"]),
        (["--guidance", 1, -0.5, 2], ["--guidance", "-0.5"]),
        (["--guidance", 1, "nan"], ["--guidance", "nan"]),
        (["--guidance-range", -1, 2], ["--guidance", "-1"]),
        (["--guidance-range", 0, "inf"], ["--guidance"]),
        (["--guidance-range", "nan", 1], ["--guidance", "nan"]),
        (["--sweep", "--guidance", 0, 1, "--labels", 3, 10], ["--labels 10", "10 classes"]),
        (["--labels", -1], ["--labels -1", "10 classes"]),
        (["--sweep", "--num", 0], ["--num", "0"]),
    ],
)
def test_strengths_and_labels_without_sense_are_refused(sample, arguments, said):
    result = sample("deterministic", *arguments)
    assert_refused(result, *said)
    assert not Path("grid.png").exists()


def test_a_refused_strength_is_written_as_it_was_given(sample):
    assert sample("deterministic", "--guidance", -0.3).err.strip().endswith("got -0.3")


def test_a_range_needs_two_numbers(sample):
    result = sample("deterministic", "--guidance-range", 1)
    assert result.code == 2 and "--guidance-range" in result.err and "Traceback" not in result.err


@pytest.mark.parametrize(
    "arguments", [["--guidance", 1], ["--guidance", 0, 2], ["--guidance", 0, 2, "--sweep"], ["--guidance-range", 0, 1]]
)
def test_without_classes_there_is_nothing_to_guide(sample, arguments):
    assert_refused(sample("unlabelled", *arguments), "unconditional", "use 0")


def test_labels_for_a_model_without_classes_are_refused(sample):
    result = sample("unlabelled", "--labels", 0)
    assert_refused(result, "--labels 0", "no classes")


@pytest.mark.parametrize("w", [0.3, 0.1, 1.1])
def test_a_strength_at_the_end_of_the_trained_range_is_no_warning(sample, models, tmp_path, w):
    """0.3 in single precision is a little more than 0.3."""
    save_model(tmp_path / "range", kind="stage2", guidance_range=(0.0, w), steps=2)
    save_model(tmp_path / "fixed", unet=TINY, kind="stage2", guidance_range=(w, w), steps=2)
    for name in ("range", "fixed"):
        result = sample(tmp_path / name, "--guidance", w, "--num", 4, "--overwrite")
        assert result.code == 0 and not result.err, result.err


@pytest.mark.parametrize(
    ("arguments", "outside"),
    [(["--guidance-range", 0, 8], "8"), (["--guidance", 5, 1, 5], "5"), (["--sweep", "--guidance", 0, 6], "6")],
)
def test_strengths_outside_the_trained_range_are_one_warning(sample, arguments, outside):
    result = sample("deterministic", *arguments, "--num", 20)
    assert result.code == 0 and Path("grid.png").is_file()
    assert result.err.startswith("warning: ") and outside in result.err and "[0, 4]" in result.err
    assert result.err.count("\n") == 1
