"""Sizes, endings and room are looked at before the work, and what is done stays whatever ends it."""

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path

import command_lines
import numpy as np
import pytest
from command_lines import assert_refused
from PIL import Image

from fastdiff import evaluate, figures, files, sample, translate
from fastdiff.errors import UserError
from train import compare, demo

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


@pytest.fixture
def no_work(monkeypatch):
    for module in (sample, evaluate):
        monkeypatch.setattr(module, "generate", lambda *_, **__: pytest.fail("it sampled"))


@pytest.fixture
def draw(run, runs):
    given = ["--checkpoint", runs.stage2 / "steps-1", "--device", "cpu"]
    return lambda *more: run("sample", *given, *more)


# --- before ---


@pytest.mark.parametrize(("ending", "most"), [("webp", 16_383), ("jpg", 65_500), ("gif", 65_535), ("ico", 256)])
def test_a_grid_that_its_format_cannot_hold_is_refused_before_it_is_drawn(draw, no_work, ending, most):
    """A grid's last row once failed after all sampling; a .ico was made smaller without a word."""
    count = most // 25 + 1
    size = f"{count * 25 + 1}×26 pixels"
    assert_refused(draw("--sweep", "--num", count, "--out", f"o.{ending}"), f"o.{ending}", size, f"at most {most}")
    assert not Path(f"o.{ending}").exists()


@pytest.mark.parametrize("name", ["o.svg", "o.heic", "o.psd", "o.xbm", "o.PDF", "a/o.h5"])
def test_an_ending_of_pictures_that_cannot_be_written_is_refused(draw, no_work, name):
    """Such a name once became a folder."""
    assert_refused(draw("--out", name), f"--out {name}", "Pillow writes no picture", ".png")
    assert not Path(name).exists() and not Path("a").exists()


@pytest.mark.parametrize("ending", ["gif", "bmp", "TIFF", "webp", "ppm", "jp2"])
def test_an_ending_that_pillow_writes_is_a_picture(draw, ending):
    result = draw("--num", 4, "--out", f"o.{ending}")
    assert result.code == 0, result.err
    with Image.open(f"o.{ending}") as picture:
        assert picture.size == (4 * 25 + 1, 26)


@pytest.mark.parametrize("name", ["images", "run.4", "v1.5"])
def test_other_names_are_folders(draw, name):
    assert draw("--num", 2, "--out", name).code == 0
    assert sorted(path.name for path in Path(name).iterdir()) == ["000000.png", "000001.png"]


@pytest.mark.parametrize("name", ["grid.png", "folder"])
def test_room_is_looked_at_before(draw, no_work, monkeypatch, name):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(10_000))
    result = draw("--num", 30, "--out", name)
    assert_refused(result, "make room there", "MiB")


def test_a_class_that_is_none_costs_no_picture(draw):
    """With --overwrite the old pictures were once removed first."""
    assert draw("--num", 2, "--out", "o").code == 0
    assert_refused(draw("--num", 2, "--out", "o", "--overwrite", "--labels", "cat"), "--labels cat")
    assert len(list(Path("o").iterdir())) == 2


@pytest.mark.parametrize("name", ["curves", "curves.gifx", "curves.pgf"])
def test_a_plot_that_cannot_be_written_is_refused(run, runs, name):
    assert_refused(run("plot", runs.teacher, "--out", name), f"--out {name}", "png", "svg")
    assert not list(Path().iterdir())


@pytest.mark.parametrize("command", ["teacher", "stage1"])
def test_a_folder_that_holds_a_run_is_refused_before_the_data_are_read(run, runs, monkeypatch, command):
    monkeypatch.setattr("fastdiff.data.load", lambda *_: pytest.fail("it read the data"))
    of = ["--teacher", runs.teacher] if command == "stage1" else []
    result = run(command, *of, "--device", "cpu", "--out", getattr(runs, command))
    assert_refused(result, "already holds a run")
    Path("file").write_text("mine")
    assert_refused(run(command, *of, "--device", "cpu", "--out", "file/run"), "file/run", "cannot be made")


def test_a_comparison_with_other_options_is_refused_before_anything_is_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(compare.Reference, "load", lambda *_, **__: pytest.fail("it trained an extractor"))
    (tmp_path / "results.json").write_text(json.dumps({"options": {"num": 3}, "rows": []}))
    with pytest.raises(UserError, match="was made with"):
        compare.main(compare.Options(out=tmp_path, device="cpu"))


def test_a_demo_of_too_few_images_is_refused_before_anything_is_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(demo.Reference, "load", lambda *_, **__: pytest.fail("it trained an extractor"))
    images = command_lines.write_images(tmp_path / "images", channels=1)
    with pytest.raises(UserError, match="--batch-size 64 is larger than the data set images"):
        demo.main(demo.Options(out=tmp_path / "demo", data=str(images), device="cpu"))


# --- when it ends at any moment ---


def interrupted(calls, real):
    """A function that Ctrl-C ends at one of its calls."""

    def call(*given, **how):
        if next(calls) == 0:
            raise KeyboardInterrupt
        return real(*given, **how)

    return call


def test_rows_of_scores_that_are_done_stay(run, runs, extractor, monkeypatch):
    """They were once written at the end, all at once."""
    monkeypatch.setattr(evaluate, "evaluate", interrupted(iter((2, 1, 0)), evaluate.evaluate))
    given = ["--checkpoint", runs.stage2 / "steps-1", "--num", 8, "--guidance", 0, 1, 2, "--device", "cpu"]
    monkeypatch.setattr("runpy.run_module", lambda *_, **__: evaluate.cli.run(evaluate.main, evaluate.Options))
    assert run("evaluate", *given).code == 130
    assert [row["guidance"] for row in json.loads(Path("results.json").read_text())["rows"]] == [0, 1]


def test_pictures_and_rows_of_translations_that_are_done_stay(runs, monkeypatch, tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("a.png")
    real = interrupted(iter((4, 3, 2, 1, 0)), translate.Pair.translate)  # two for each strength
    monkeypatch.setattr(translate.Pair, "translate", real)
    models = {"encoder": runs.stage1, "decoder": runs.stage1, "encoder_steps": 1, "decoder_steps": 1}
    what = {"images": Path("a.png"), "from_label": "3", "to_label": "8", "out": Path("out"), "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        translate.main(translate.Options(**models, **what, guidance=(0.0, 1.0, 2.0)))
    assert {path.name for path in Path("out").iterdir()} == {"a-w0.png", "a-w1.png", "strip.png", "report.json"}
    assert [row["guidance"] for row in json.loads(Path("out/report.json").read_text())["rows"]] == [0, 1]


FULL = OSError(errno.ENOSPC, "No space left on device")


def fill(*_, **__):
    raise FULL


@pytest.mark.parametrize("command", ["sample", "evaluate", "plot"])
def test_a_full_drive_is_a_sentence_and_leaves_no_half_file(run, runs, extractor, monkeypatch, command):
    old = Path({"sample": "grid.png", "evaluate": "results.json", "plot": "curves.png"}[command])
    old.write_text("old")
    monkeypatch.setattr(files, "sync", fill)
    model = ["--checkpoint", runs.stage2 / "steps-1", "--num", 2, "--device", "cpu"]
    result = run(command, *(model if command != "plot" else [runs.teacher]), "--overwrite")
    assert_refused(result, old.name, "No space left on device", "make room")
    assert old.read_text() == "old" and [path.name for path in Path().iterdir()] == [old.name]


def test_any_other_write_to_a_full_drive_is_a_sentence_too(run, runs, monkeypatch):
    monkeypatch.setattr(figures, "save_image", fill)
    assert_refused(
        run("sample", "--checkpoint", runs.stage2 / "steps-1", "--num", 2, "--out", "o", "--device", "cpu"),
        "was not written (No space left on device)",
    )
