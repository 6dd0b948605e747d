"""Every mistake gives one sentence on stderr and exit code 2, and leaves what is there alone; the good paths work."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import command_lines
import numpy as np
import pytest
from command_lines import MODULES, Result, assert_refused, write_images, write_zip
from common import TINY, snapshot
from PIL import Image

import kernels
from fastdiff import checkpoint, cli, metrics
from fastdiff.denoiser import Denoiser, DenoiserConfig

ROOT = Path(__file__).parents[2]
SMALL = ["--device", "cpu", "--updates", "2", "--batch-size", "8"]
NET = ["--unet.channels", "8", "--unet.channel-mult", "1"]

run, elsewhere = command_lines.run, command_lines.elsewhere
# runpy says so of every module that was imported before
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


# --- as real processes, all at once ---

MISTAKES = {
    "teacher": (["--data", "nowhere", "--out", "o"], "nowhere"),
    "stage1": (["--teacher", "nowhere", "--out", "o"], "nowhere"),
    "stage2": (["--teacher", "nowhere", "--out", "o"], "nowhere"),
    "demo": (["--minutes", "0", "--out", "o"], "--minutes"),
    "sample": (["--checkpoint", "nowhere"], "nowhere"),
    "evaluate": (["--checkpoint", "nowhere", "--guidance", "0", "1"], "nowhere"),
}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    lines = {name: ["-m", MODULES[name], *arguments] for name, (arguments, _) in MISTAKES.items()}
    main = "import sys; from train.commands import main; sys.argv[0] = 'fastdiff'; main()"
    lines["fastdiff sample"] = ["-c", main, "sample", "--checkpoint", "nowhere"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = {
        name: subprocess.Popen(
            [sys.executable, *line],
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name, line in lines.items()
    }
    results = {}
    for name, process in started.items():
        out, err = process.communicate(timeout=120)
        results[name] = Result(process.returncode, out, err)
    return folder, results


@pytest.mark.parametrize("name", [*MISTAKES, "fastdiff sample"])
def test_a_process_ends_with_one_sentence(processes, name):
    folder, results = processes
    assert_refused(results[name], MISTAKES.get(name, (None, "nowhere"))[1])
    assert not results[name].out and not list(folder.iterdir())


# --- help and presets ---


@pytest.mark.parametrize("name", MODULES)
def test_help(run, name):
    result = run(name, "--help")
    assert result.code == 0 and not result.err
    without = ("status", "plot", "report", "import", "export")
    assert ("--device" in result.out or name in without) and "usage" in result.out
    through = run("fastdiff", name, "--help")
    assert (through.code, through.out) == (0, result.out)


def test_fastdiff_lists_its_commands(run):
    for arguments, code in ((["--help"], 0), (["-h"], 0), ([], 2)):
        result = run("fastdiff", *arguments)
        assert result.code == code
        assert all(re.search(rf"^  {name} ", result.out, re.MULTILINE) for name in MODULES)


def test_unknown_command(run):
    result = run("fastdiff", "smaple")
    assert result.code == 2 and "smaple" in result.err and "sample" in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("name", MODULES)
def test_unknown_option(run, name):
    source = ["folder"] if name in ("import", "export") else []  # else that is what it misses first
    result = run(name, *source, "--nonsense", "1")
    assert result.code == 2 and "--nonsense" in result.err and "Traceback" not in result.err


@pytest.mark.parametrize("name", ["teacher", "stage1", "stage2", "sample", "evaluate"])
def test_missing_option(run, name):
    result = run(name)
    assert result.code == 2 and "required" in result.err


def test_a_command_line_may_be_empty(monkeypatch):
    """As `python -m train.demo` is, where every option has a default."""
    given = []

    @dataclass(frozen=True)
    class Options:
        number: int = 3

    for presets in (None, {"large": {"number": 5}}):
        monkeypatch.setattr(sys, "argv", ["command"])
        cli.run(given.append, Options, presets)
    assert [options.number for options in given] == [3, 3]


@pytest.mark.parametrize("arguments", [["--preset", "cifar10"], ["--preset=cifar10"]])
def test_a_presets_help_shows_its_values(run, arguments):
    for name, updates in (("teacher", 800_000), ("stage1", 100_000), ("stage2", 50_000)):
        text = run(name, *arguments, "--help").out
        assert f"(default: {updates})" in text and "(default: cifar10)" in text and "(default: bf16)" in text
        assert f"(default: {updates})" not in run(name, "--help").out
    assert "(default: 256)" in run("teacher", *arguments, "--help").out  # the network's channels


@pytest.mark.parametrize("name", ["teacher", "stage1", "stage2"])
def test_unknown_preset(run, name):
    assert_refused(run(name, "--preset", "cifar11", "--out", "o"), "cifar11", "cifar10", "imagenet64")


def test_unknown_preset_of_the_demo(run):
    assert_refused(run("demo", "--preset", "cifar10", "--out", "o"), "cifar10", "digits", "fashion-mnist")


@pytest.mark.parametrize(
    ("preset", "side", "millions"), [("digits", 8, 0.2), ("cifar10", 32, 30), ("imagenet64", 64, 200)]
)
def test_dry_run_of_the_presets(run, tmp_path, preset, side, millions):
    write_images(tmp_path / "images", size=(side, side), count=8)
    for command, place in [("teacher", None), ("stage1", "teacher")]:
        if preset != "digits" and command == "stage1":
            continue
        given = ["--preset", preset, "--data", "images", "--batch-size", "4", "--out", "out", "--device", "cpu"]
        if place:
            config = DenoiserConfig(replace(TINY, image_channels=3, num_classes=2), class_names=("a", "b"))
            checkpoint.save(tmp_path / place, Denoiser(config))
            given += ["--teacher", place]
        result = run(command, *given, "--dry-run")
        assert result.code == 0 and not result.err, result.err
        found = float(re.search(r"model +([\d.]+) M parameters", result.out).group(1))
        assert place or found > millions
        assert re.search(r"updates +\d+", result.out) and re.search(r"memory +about [\d.]+ GiB", result.out)
        assert f"3×{side}×{side}" in result.out
        assert not (tmp_path / "out").exists()


def test_dry_run_of_stage2(run, runs):
    result = run(
        "stage2", "--teacher", runs.stage1, "--start-steps", "8", "--out", "out", "--device", "cpu", "--dry-run"
    )
    assert result.code == 0, result.err
    assert re.findall(r"(\d+) -> (\d+) steps: (\d+)", result.out) == [
        ("8", "4", "2000"),
        ("4", "2", "4000"),
        ("2", "1", "4000"),
    ]
    assert "memory" in result.out and not Path("out").exists()


# --- data ---


@pytest.mark.parametrize("name", ["missing", "missing.zip", "cifar10"])
def test_unknown_data(run, name):
    assert_refused(run("teacher", "--data", name, "--out", "o"), name)
    assert not Path("o").exists()


def test_empty_folder_of_data(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(run("teacher", "--data", "empty", "--out", "o"), "empty", "no images")


def test_image_that_cannot_be_decoded(run, tmp_path):
    write_images(tmp_path / "images")
    (tmp_path / "images/b/99.png").write_bytes(b"\x89PNG nonsense")
    assert_refused(run("teacher", "--data", "images", "--out", "o", *SMALL), "images/b/99.png", "decoded")
    assert not Path("o").exists()


def test_truncated_image(run, tmp_path):
    path = write_images(tmp_path / "images", size=(32, 32)) / "a/04.png"
    path.write_bytes(path.read_bytes()[:300])
    assert_refused(run("teacher", "--data", "images", "--out", "o", *SMALL), "images/a/04.png")


def test_images_of_two_sizes(run, tmp_path):
    write_images(tmp_path / "images")
    write_images(tmp_path / "images", size=(8, 16), count=1, classes=("c",))
    assert_refused(run("teacher", "--data", "images", "--out", "o", *SMALL), "images/c/00.png", "16x8", "8x8")


@pytest.mark.parametrize("label", [-1, 1.5, "3", None, True, 10**9])
def test_label_that_is_none(run, tmp_path, label):
    write_zip(tmp_path / "data.zip", [0, 1, label, 1])
    assert_refused(run("teacher", "--data", "data.zip", "--out", "o", *SMALL), "data.zip", "2.png", repr(label))


def test_batch_larger_than_the_data(run, runs, tmp_path):
    write_images(tmp_path / "images")
    given = ["--data", "images", "--out", "o", "--batch-size", "1000", "--device", "cpu"]
    assert_refused(run("teacher", *given), "--batch-size 1000", "images")
    given = ["--out", "o", "--batch-size", "5000", "--device", "cpu"]
    assert_refused(run("stage1", "--teacher", runs.teacher, *given), "--batch-size 5000", "digits")
    assert_refused(run("stage2", "--teacher", runs.stage1, *given), "--batch-size 5000", "digits")
    assert not Path("o").exists()


def test_data_that_do_not_fit_the_checkpoint(run, runs, tmp_path):
    write_images(tmp_path / "colour")
    write_images(tmp_path / "grey", channels=1)
    for command, option, place in [
        ("stage1", "--teacher", runs.teacher),
        ("stage2", "--teacher", runs.stage1),
        ("evaluate", "--checkpoint", runs.stage1),
    ]:
        given = [option, place, "--out", "o", "--device", "cpu"]
        assert_refused(run(command, *given, "--data", "colour"), "3×8×8", "1×8×8", place)
        assert_refused(run(command, *given, "--data", "grey"), "2 classes", "10", place)
    assert not Path("o").exists()


def test_network_that_does_not_fit_the_images(run, tmp_path):
    write_images(tmp_path / "images", size=(6, 6))
    result = run("teacher", "--data", "images", "--out", "o", *SMALL, "--unet.channel-mult", "1", "1", "1")
    assert_refused(result, "--unet", "6×6")


@pytest.mark.parametrize("asked", [["16"], ["8", "4", "2"]])
def test_attention_where_no_level_is_is_refused(run, runs, tmp_path, asked):
    """It was once left out without a word; models that were made so still load, and their runs go on."""
    given = [*SMALL, *NET, "1", "--unet.head-width", "8", "--unet.attention-resolutions", *asked]
    result = run("teacher", "--out", "o", *given)
    assert_refused(result, f"--unet.attention-resolutions {asked[-1]}", "the levels have 8, 4")
    assert not Path("o").exists()
    unet = replace(TINY, attention_resolutions=(16,))
    checkpoint.save(tmp_path / "old", Denoiser(DenoiserConfig(unet)))
    assert checkpoint.load(tmp_path / "old").config.unet == unet


def test_evaluate_needs_labels(run, tmp_path):
    write_images(tmp_path / "images", classes=())
    config = DenoiserConfig(replace(TINY, image_channels=3, num_classes=0))
    checkpoint.save(tmp_path / "model", Denoiser(config))
    given = ["--checkpoint", "model", "--data", "images", "--device", "cpu"]
    assert_refused(run("evaluate", *given), "images", "labels")
    assert_refused(
        run("sample", "--checkpoint", "model", "--guidance", "1", "--device", "cpu"), "unconditional", "--guidance 1"
    )


@pytest.mark.parametrize("command", ["evaluate", "sid"])
def test_scores_of_too_few_images_are_refused_before_anything_is_trained(run, tmp_path, monkeypatch, command):
    """Two classes of two images once trained an extractor for a minute, and then failed in linear algebra."""
    monkeypatch.setattr(metrics, "_train", None)
    write_images(tmp_path / "images", channels=1, count=4)
    checkpoint.save(tmp_path / "model", Denoiser(DenoiserConfig(replace(TINY, num_classes=2))))
    option = "--teacher" if command == "sid" else "--checkpoint"
    result = run(command, option, "model", "--data", "images", "--out", "o", "--device", "cpu")
    assert_refused(result, "--data images", "need 4 images or more", "has 2")
    assert not Path("o").exists()


def test_scores_of_as_few_images_as_there_can_be(run, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_train", lambda network, train, test: 1.0)
    write_images(tmp_path / "images", channels=1, count=6)
    checkpoint.save(tmp_path / "model", Denoiser(DenoiserConfig(replace(TINY, num_classes=2))))
    given = ["--data", "images", "--num", 2, "--steps", 1, "--out", "o.json", "--device", "cpu"]
    result = run("evaluate", "--checkpoint", "model", *given)
    assert result.code == 0 and json.loads(Path("o.json").read_text())["rows"][0]["fd"] >= 0, result.err


# --- checkpoints ---


def damage(folder, what):
    weights, config = folder / "model.safetensors", folder / "model.json"
    if what in ("another architecture", "unknown field", "another format"):
        (folder / "manifest.json").unlink()  # it would name the file before anything is read
    match what:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:1000])
        case "short by a byte":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "empty":
            weights.write_bytes(b"")
        case "no weights":
            weights.unlink()
        case "half a config":
            config.write_text(config.read_text()[:100])
        case "a list":
            config.write_text("[1]")
        case "binary":
            config.write_bytes(bytes(range(128, 256)))
        case "another architecture":
            values = json.loads(config.read_text())
            values["unet"]["channels"] = 16
            config.write_text(json.dumps(values))
        case "unknown field":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"nonsense": 1}))
        case "another format":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"format": 99}))
        case "impossible architecture":
            values = json.loads(config.read_text())
            values["unet"]["channels"] = 7
            config.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("truncated", "model.safetensors"),
        ("short by a byte", "model.safetensors"),
        ("empty", "model.safetensors"),
        ("no weights", "model.safetensors"),
        ("half a config", "model.json"),
        ("a list", "model.json"),
        ("binary", "model.json"),
        ("another architecture", "another architecture"),
        ("unknown field", "nonsense"),
        ("another format", "format"),
        ("impossible architecture", "model.json"),
    ],
)
def test_damaged_checkpoint(run, tmp_path, what, named):
    checkpoint.save(tmp_path / "model", Denoiser(DenoiserConfig(TINY)))
    damage(tmp_path / "model", what)
    assert_refused(run("sample", "--checkpoint", "model", "--device", "cpu"), named, "model")
    if what in ("truncated", "another architecture"):
        for command in ("stage1", "stage2"):
            assert_refused(run(command, "--teacher", "model", "--out", "o", "--device", "cpu"), named)
        assert_refused(run("evaluate", "--checkpoint", "model", "--device", "cpu"), named)
    assert not Path("o").exists() and not Path("grid.png").exists()


def test_folder_without_checkpoint(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(run("sample", "--checkpoint", "empty"), "empty", "no checkpoint")


@pytest.mark.parametrize("name", ["steps-final", "checkpoint-best"])
def test_folder_of_another_programs_checkpoints(run, tmp_path, name):
    (tmp_path / "other" / name).mkdir(parents=True)
    (tmp_path / "other" / name / "model.json").write_text("{}")
    assert_refused(run("sample", "--checkpoint", "other"), "other")


def test_folder_of_several_models(run, runs):
    assert_refused(run("sample", "--checkpoint", runs.stage2), "steps-1", "steps-2")


def test_stage2_says_what_to_run_before(run, runs):
    result = run("stage2", "--teacher", runs.teacher, "--out", "o", "--device", "cpu")
    assert_refused(result, f"python -m train.stage1 --teacher {runs.teacher}")


@pytest.mark.parametrize("of", ["stage1", "stage2/steps-2"])
def test_stage1_of_a_student(run, runs, of):
    place = runs.teacher.parent / of
    assert_refused(run("stage1", "--teacher", place, "--out", "o", "--device", "cpu"), place, "train.stage2")


@pytest.mark.parametrize(("start", "end"), [(64, 3), (8, 8), (4, 8), (8, 0), (0, 0), (12, 1), (-8, 1), (8, -1)])
def test_steps_that_halving_does_not_connect(run, runs, start, end):
    given = ["--start-steps", start, "--end-steps", end]
    assert_refused(run("stage2", "--teacher", runs.stage1, "--out", "o", "--device", "cpu", *given), start, end)
    assert not Path("o").exists()


# --- numbers ---


@pytest.mark.parametrize("command", ["teacher", "stage1", "stage2"])
@pytest.mark.parametrize(("option", "value"), [("--updates", 0), ("--updates", -3), ("--lr", 0), ("--batch-size", 0)])
def test_training_numbers_without_sense(run, runs, command, option, value):
    of = {"teacher": [], "stage1": ["--teacher", runs.teacher], "stage2": ["--teacher", runs.stage1]}[command]
    assert_refused(run(command, *of, "--out", "o", "--device", "cpu", option, value), option, value)
    assert not Path("o").exists()


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--steps", 0),
        ("--steps", -4),
        ("--num", 0),
        ("--num", -1),
        ("--batch-size", 0),
        ("--guidance", -0.5),
        ("--guidance", "nan"),
        ("--guidance", "inf"),
    ],
)
def test_sampling_numbers_without_sense(run, runs, command, option, value):
    result = run(command, "--checkpoint", runs.stage1, "--device", "cpu", "--out", "x.png", option, value)
    assert_refused(result, option, value)
    assert not Path("x.png").exists()


def test_one_image_cannot_be_scored(run, runs, extractor):
    place = runs.stage2 / "steps-1"
    assert_refused(run("evaluate", "--checkpoint", place, "--device", "cpu", "--num", 1), "--num", 1)


@pytest.mark.parametrize("command", ["teacher", "sample"])
def test_unknown_device(run, runs, command):
    given = {"teacher": ["--out", "o"], "sample": ["--checkpoint", runs.stage1]}[command]
    assert_refused(run(command, *given, "--device", "tpu"), "--device tpu")


@pytest.mark.parametrize("label", [99, 10, -1])
def test_label_outside_the_classes(run, runs, label):
    result = run("sample", "--checkpoint", runs.stage1, "--labels", 3, label, "--device", "cpu")
    assert_refused(result, f"--labels {label}", "10 classes")
    assert not Path("grid.png").exists()


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_guidance_outside_the_trained_range_is_a_warning(run, runs, command, request):
    request.getfixturevalue("extractor") if command == "evaluate" else None
    out = {"sample": "grid.png", "evaluate": "results.json"}[command]
    given = ["--checkpoint", runs.stage2 / "steps-1", "--num", 4, "--device", "cpu", "--out", out]
    result = run(command, *given, "--guidance", 5)
    assert result.code == 0 and Path(out).is_file()
    assert result.err.count("\n") == 1 and result.err.startswith("warning: ")
    assert "5" in result.err and "[0, 4]" in result.err
    assert not run(command, *given, "--guidance", 4, "--overwrite").err


def test_other_steps_than_trained_are_a_warning(run, runs):
    result = run("sample", "--checkpoint", runs.stage2 / "steps-2", "--num", 4, "--steps", 4, "--device", "cpu")
    assert result.code == 0 and result.err.startswith("warning: ") and "2 steps" in result.err
    assert "4 network calls" in result.out


# --- outputs ---


@pytest.fixture
def finished(run):
    """A folder with a run of the teacher of two updates."""
    result = run("teacher", "--out", "run", *SMALL, *NET)
    assert result.code == 0, result.err
    return Path("run")


def test_a_folder_with_a_run_is_refused(run, runs, finished):
    before = snapshot(finished)
    assert_refused(run("teacher", "--out", "run", *SMALL, *NET), "run", "--resume", "--overwrite")
    assert_refused(run("stage1", "--teacher", runs.teacher, "--out", "run", *SMALL), "run", "--resume", "--overwrite")
    assert_refused(run("stage2", "--teacher", runs.stage1, "--out", "run", *SMALL), "run", "--resume", "--overwrite")
    assert snapshot(finished) == before


@pytest.mark.parametrize("option", [None, "--overwrite", "--resume"])
def test_a_folder_with_foreign_files_is_refused(run, tmp_path, option):
    (tmp_path / "mine/checkpoint-500").mkdir(parents=True)
    (tmp_path / "mine/notes.txt").write_text("mine")
    (tmp_path / "mine/checkpoint-500/weights.bin").write_text("mine")
    before = snapshot(tmp_path / "mine")
    given = [option] if option else []
    assert_refused(run("teacher", "--out", "mine", *SMALL, *NET, *given), "mine", "no run of fastdiff")
    assert snapshot(tmp_path / "mine") == before


@pytest.mark.parametrize("content", ['{"model_type": "bert"}', "[1, 2]", "{}", "nonsense", b"\xff\xfe"])
@pytest.mark.parametrize("option", ["--overwrite", "--resume"])
def test_a_foreign_folder_with_a_config_json_is_refused(run, tmp_path, option, content):
    """Other programs write config.json and checkpoint-500, too."""
    (tmp_path / "mine/checkpoint-500").mkdir(parents=True)
    (tmp_path / "mine/config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "mine/checkpoint-500/weights.bin").write_text("mine")
    before = snapshot(tmp_path / "mine")
    assert_refused(run("teacher", "--out", "mine", *SMALL, *NET, option), "mine", "no run of fastdiff")
    assert snapshot(tmp_path / "mine") == before


def test_a_file_where_the_folder_should_be_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    for given in ([], ["--overwrite"]):
        assert_refused(run("teacher", "--out", "file", *SMALL, *NET, *given), "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_resume_with_other_options_names_them(run, finished):
    before = snapshot(finished)
    result = run("teacher", "--out", "run", *SMALL, *NET, "--resume", "--ema", "0.5", "--batch-size", "4")
    assert_refused(result, "--ema was 0.999, is 0.5", "--batch-size was 8, is 4")
    assert "--updates" not in result.err and "--resume was" not in result.err
    assert snapshot(finished) == before


def test_resume_with_other_data_says_so(run, tmp_path):
    write_images(tmp_path / "images")
    given = ["--data", "images", "--out", "run", *SMALL, *NET]
    assert run("teacher", *given).code == 0
    write_images(tmp_path / "images", count=14)
    assert_refused(run("teacher", *given, "--resume"), "the data set is another")


def test_resume_continues_and_overwrite_replaces(run, finished):
    rows = (finished / "metrics.jsonl").read_text()
    more = ["--device", "cpu", "--updates", "4", "--batch-size", "8"]
    assert run("teacher", "--out", "run", *more, *NET, "--resume").code == 0
    assert (finished / "metrics.jsonl").read_text().startswith(rows)
    assert checkpoint.find(finished).name == "checkpoint-0000004"
    assert run("teacher", "--out", "run", *SMALL, *NET, "--overwrite", "--seed", "1").code == 0
    assert len((finished / "metrics.jsonl").read_text().splitlines()) == 1
    assert checkpoint.find(finished).name == "checkpoint-0000002"


def test_resume_and_overwrite_together(run):
    assert_refused(run("teacher", "--out", "run", "--resume", "--overwrite"), "--resume", "--overwrite")


@pytest.mark.parametrize(("command", "name"), [("sample", "grid.png"), ("evaluate", "results.json")])
def test_an_existing_output_is_refused(run, runs, tmp_path, command, name):
    (tmp_path / name).write_text("mine")
    given = ["--checkpoint", runs.stage2 / "steps-1", "--device", "cpu", "--num", 4]
    assert_refused(run(command, *given), name, "--overwrite")  # the default name
    assert (tmp_path / name).read_text() == "mine"
    (tmp_path / "folder.png").mkdir()
    assert_refused(run(command, *given, "--out", "folder.png", "--overwrite"), "folder.png")


def test_an_existing_folder_of_samples_is_refused(run, runs, tmp_path):
    write_images(tmp_path / "mine", classes=(), count=1)
    given = ["--checkpoint", runs.stage2 / "steps-1", "--device", "cpu", "--num", 4]
    assert_refused(run("sample", *given, "--out", "mine"), "mine", "--overwrite")
    (tmp_path / "file").write_text("mine")
    assert_refused(run("sample", *given, "--out", "file", "--overwrite"), "file")
    assert (tmp_path / "file").read_text() == "mine"


# --- what the commands make ---


def test_sample_makes_a_grid(run, runs):
    result = run("sample", "--checkpoint", runs.stage2 / "steps-2", "--num", 20, "--guidance", 1, "--device", "cpu")
    assert result.code == 0 and not result.err
    assert "20 images in 2 ddim steps, 2 network calls an image" in result.out
    with Image.open("grid.png") as image:  # 10 columns, 2 rows, 8 pixels enlarged 3 times, 1 pixel between
        assert image.size == (10 * 25 + 1, 2 * 25 + 1) and image.mode == "RGB"
    again = Path("grid.png").read_bytes()
    given = ["--num", 20, "--guidance", 1, "--device", "cpu", "--overwrite", "--batch-size", 7]
    assert run("sample", "--checkpoint", runs.stage2 / "steps-2", *given).code == 0
    assert Path("grid.png").read_bytes() == again
    assert run("sample", "--checkpoint", runs.stage2 / "steps-2", *given, "--seed", 1).code == 0
    assert Path("grid.png").read_bytes() != again


def test_sample_makes_a_folder_of_pictures(run, runs):
    result = run("sample", "--checkpoint", runs.teacher, "--num", 5, "--steps", 2, "--guidance", 1, "--out", "a/b")
    assert result.code == 0, result.err
    assert "4 network calls" in result.out  # 2 steps of a guided teacher
    names = sorted(path.name for path in Path("a/b").iterdir())
    assert names == [f"{index:06d}.png" for index in range(5)]
    pictures = [np.asarray(Image.open(Path("a/b") / name)) for name in names]
    assert all(picture.shape == (8, 8) and picture.dtype == np.uint8 for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 5


def test_sample_of_one_class(run, runs):
    given = ["--checkpoint", runs.stage2 / "steps-1", "--guidance", 4, "--device", "cpu"]
    assert run("sample", *given, "--num", 10, "--out", "all").code == 0
    assert run("sample", *given, "--num", 6, "--labels", 3, "--out", "threes").code == 0
    assert run("sample", *given, "--num", 4, "--labels", 2, 3, "--out", "pairs").code == 0

    def picture(folder, index):
        return (Path(folder) / f"{index:06d}.png").read_bytes()

    assert picture("all", 3) == picture("threes", 3) == picture("pairs", 3)  # noise 3, class 3
    assert picture("all", 2) == picture("pairs", 2)


def test_evaluate_writes_results(run, runs, extractor):
    place = runs.stage2 / "steps-2"
    given = ["--num", 30, "--guidance", 0, 1, "--seed", 3, "--device", "cpu", "--out", "deep/results.json"]
    result = run("evaluate", "--checkpoint", place, *given)
    assert result.code == 0 and not result.err
    found = json.loads(Path("deep/results.json").read_text())
    assert set(found) == {"reference", "rows"}
    assert set(found["reference"]) == {
        "data",
        "split",
        "images",
        "extractor",
        "extractor_test_accuracy",
        "half_against_half_fd",
        "score",
    }
    assert found["reference"]["half_against_half_fd"] > 0 and found["reference"]["extractor"] == extractor.name
    assert [row["guidance"] for row in found["rows"]] == [0, 1]
    for row in found["rows"]:
        assert set(row) == {
            "model",
            "sampler",
            "steps",
            "nfe",
            "guidance",
            "fd",
            "score",
            "images_per_second",
            "num",
            "seed",
        }
        assert (row["model"], row["sampler"], row["steps"], row["nfe"]) == (str(place), "ddim", 2, 2)
        assert (row["num"], row["seed"]) == (30, 3)
    assert f"| {place} | 2 | 2 |" in result.out


def test_the_commands_connect(run):
    """Teacher, stage 1, stage 2, sample: each takes the folder that the one before made."""
    assert run("teacher", "--out", "a/teacher", *SMALL, *NET).code == 0
    result = run("stage1", "--teacher", "a/teacher", "--guidance-range", 0, 2, "--out", "a/stage1", *SMALL)
    assert result.code == 0, result.err
    result = run("stage2", "--teacher", "a/stage1", "--start-steps", 4, "--end-steps", 2, "--out", "a/stage2", *SMALL)
    assert result.code == 0, result.err
    assert [path.name for path in Path("a/stage2").glob("steps-*")] == ["steps-2"]
    result = run("sample", "--checkpoint", "a/stage2/steps-2", "--num", 4, "--guidance", 2, "--device", "cpu")
    assert result.code == 0 and not result.err
    config = json.loads(Path("a/stage1/config.json").read_text())["options"]
    assert config["guidance_range"] == [0, 2] and config["teacher"] == "a/teacher"


@pytest.mark.parametrize("device", ["meta", "mps", "tpu", "cuda:x"])
def test_devices_that_fastdiff_does_not_run_on(run, runs, device):
    assert_refused(run("sample", "--checkpoint", runs.teacher, "--device", device), "--device", device)
    assert_refused(run("demo", "--out", "o", "--device", device), "--device", device)
    assert not Path("o").exists()


def test_an_output_below_a_file_is_refused_before_any_work(run, runs, monkeypatch):
    Path("file").write_text("mine")
    monkeypatch.setattr(Denoiser, "forward", lambda *a, **k: pytest.fail("it sampled"))
    for command, name in (("sample", "g.png"), ("evaluate", "r.json")):
        result = run(command, "--checkpoint", runs.teacher, "--device", "cpu", "--out", f"file/{name}")
        assert_refused(result, "--out", "file")
    assert_refused(run("teacher", *SMALL, *NET, "--out", "file/run"), "file")
    assert Path("file").read_text() == "mine"


def test_evaluate_without_a_strength(run, runs):
    assert_refused(run("evaluate", "--checkpoint", runs.teacher, "--device", "cpu", "--guidance"), "--guidance")


@pytest.mark.parametrize("updates", [0, -5])
def test_a_round_needs_updates(run, runs, updates):
    line = ["--teacher", runs.stage1, *SMALL, "--out", "o", "--last-updates", updates]
    assert_refused(run("stage2", *line), "--last-updates", updates)
    assert not Path("o").exists()


def test_a_range_of_guidance_is_finite(run, runs):
    line = ["--teacher", runs.teacher, *SMALL, "--out", "o", "--guidance-range", "0", "inf"]
    assert_refused(run("stage1", *line), "--guidance-range", "inf")


@pytest.mark.parametrize(
    "option", [["--unet.min-group-width", "0"], ["--unet.head-width", "-64"], ["--unet.groups", "0"]]
)
def test_networks_that_cannot_be(run, option):
    assert_refused(run("teacher", *SMALL, *NET, *option, "--out", "o"), "--unet", "positive")


def test_a_backend_that_is_not_there(run, runs, monkeypatch):
    monkeypatch.setattr("kernels.backend.BACKENDS", {"reference": kernels.reference})
    monkeypatch.setenv("FASTDIFF_KERNELS", "triton")
    assert_refused(
        run("sample", "--checkpoint", runs.teacher, "--device", "cpu", "--num", 2, "--steps", 1), "FASTDIFF_KERNELS"
    )


def test_a_run_that_diverged_can_go_on_with_a_lower_rate(run):
    first = [
        "teacher",
        "--device",
        "cpu",
        "--batch-size",
        "8",
        *NET,
        "--out",
        "o",
        "--updates",
        "4",
        "--save-every",
        "2",
    ]
    assert run(*first).code == 0
    again = run(*first, "--resume", "--updates", "6", "--lr", "1e-4", "--precision", "fp32")
    assert again.code == 0, again
    assert checkpoint.newest(Path("o")).name.endswith("6")


def test_a_loss_that_diverges_stops_the_run_and_keeps_the_last_good_checkpoint(run):
    line = ["--device", "cpu", "--batch-size", "8", *NET, "--out", "o", "--updates", "40", "--save-every", "1"]
    result = run("teacher", *line, "--lr", "1e30", "--warmup", "0", "--clip-norm", "0")
    assert result.code == 2
    last = result.err.strip().splitlines()[-1]
    update = int(re.search(r"not finite at update (\d+) of o", last)[1])
    assert last.startswith("error: ") and "Traceback" not in result.err and "--lr" in last
    assert 1 < update <= 11
    kept = checkpoint.newest(Path("o"))
    assert int(kept.name.split("-")[1]) < update
    assert all(p.isfinite().all() for p in checkpoint.load(kept).parameters())
