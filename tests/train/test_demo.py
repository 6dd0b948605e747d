"""The demo from end to end, with far too small a network and time: all files are there, and nothing is redone."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
from common import TINY, snapshot
from PIL import Image

from fastdiff.errors import UserError
from train import demo, loop, teacher
from train.report import page

RUNS = ["teacher", "stage1", *(f"steps-{n}" for n in (32, 16, 8, 4, 2, 1)), "sid"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, extractor):
    """The options and the folder of one demo, with a patch that stays for the second one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(teacher.PRESETS, "digits", {"unet": TINY, "batch_size": 16})
        patch.setattr(demo, "TIMED_STEPS", 8)
        patch.setattr(demo, "PICTURED", (0.0, 1.0))
        patch.setattr(loop, "preview", lambda *args, **kwargs: None)
        options = demo.Options(out=tmp_path_factory.mktemp("demo") / "out", minutes=0.05, num=20, device="cpu")
        demo.main(options)
        yield options


def test_results_hold_every_row(made):
    results = json.loads((made.out / "results.json").read_text())
    assert {"reference", "rows", "timing", "training", "torch", "device", "cores", "machine"} <= set(results)
    expected = {("teacher, DDIM", steps, w) for steps in (64, 8, 4, 2, 1) for w in (0, 1, 4)}
    expected |= {("student", steps, w) for steps in (8, 4, 2, 1) for w in (0, 1, 4)}
    expected |= {("SiD", 1, w) for w in (0, 1, 4)}
    rows = {(row["model"], row["steps"], row["guidance"]): row for row in results["rows"]}
    assert set(rows) == expected and len(results["rows"]) == len(expected)
    for (model, steps, w), row in rows.items():
        assert row["nfe"] == steps * (2 if w and model == "teacher, DDIM" else 1)
        assert row["num"] == 20 and row["fd"] >= 0 and 1 <= row["score"] <= 10
    assert results["reference"]["extractor_test_accuracy"] > 0.97
    assert results["timing"]["teacher_steps"] == 8
    assert results["timing"]["teacher_over_1_step_student"] > results["timing"]["teacher_over_4_step_student"] > 0
    assert results["timing"]["teacher_over_sid"] > results["timing"]["teacher_over_4_step_student"]
    assert [run["run"] for run in results["training"]] == RUNS
    assert all(run["updates"] >= 20 and run["seconds"] > 0 for run in results["training"])


def test_report_and_pictures(made):
    text = (made.out / "report.md").read_text()
    assert "samples.png" in text and "quality-vs-calls.png" in text
    assert "train.demo --preset digits --minutes 0.05 --num 20 --seed 0" in text
    for start in (
        "| teacher, DDIM | 64 |",
        "| student | 1 |",
        "| SiD | 1 |",
        "| SiD, 1 step |",
        "| student, 4 steps |",
        "| teacher, DDIM, 8 steps |",
    ):
        assert start in text
    assert all(f"\n| {name} | " in text for name in RUNS)
    html = (made.out / "report.html").read_text()
    assert len(html) < 5e6 and all(f'"name": "{made.out / name}"' in html for name in ("teacher", "stage2", "sid"))
    assert len(list((made.out / "pictures").iterdir())) == 2 * 10
    assert "train.demo --preset digits --minutes 0.05 --num 20 --seed 0 --precision" in html
    for name in ("samples.png", "quality-vs-calls.png"):
        with Image.open(made.out / name) as image:
            assert image.width > 500 and image.height > 100
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_a_second_demo_reuses_the_runs(made, monkeypatch):
    def files():
        every = {name: snapshot(made.out / name) for name in ("teacher", "stage1", "stage2", "sid")}
        return {
            name: {key: value for key, value in found.items() if key != "config.json"} for name, found in every.items()
        }

    before, report = files(), (made.out / "report.md").read_text()
    monkeypatch.setattr(loop, "_log", lambda *args: pytest.fail("it trained again"))
    demo.main(made)
    assert files() == before
    tables = [text.split("Training took")[0] for text in (report, (made.out / "report.md").read_text())]
    assert tables[0] == tables[1]


def test_an_interruption_after_the_first_score_leaves_it(made, tmp_path, monkeypatch):
    out = shutil.copytree(made.out, tmp_path / "demo")
    score, scored = demo.Method.score, []

    def once(*arguments):
        if scored:
            raise KeyboardInterrupt
        scored.append(score(*arguments))
        return scored[0]

    monkeypatch.setattr(demo.Method, "score", once)
    with pytest.raises(KeyboardInterrupt):
        demo.main(replace(made, out=out))
    results = json.loads((out / "results.json").read_text())
    assert results["rows"] == [asdict(scored[0])] and "timing" not in results
    page.write(tmp_path / "report.html", [out])


@pytest.mark.parametrize(
    "changes", [{"minutes": 0.0}, {"minutes": -1.0}, {"num": 1}, {"num": 0}, {"preset": "cifar10"}]
)
def test_options_without_sense_are_refused(tmp_path, changes):
    with pytest.raises(UserError, match=f"{next(iter(changes))}"):
        demo.main(demo.Options(out=tmp_path / "out", device="cpu", **changes))
    assert not (tmp_path / "out").exists()


def test_scoring_that_seems_slow_leaves_half_of_the_time_for_training(tmp_path, monkeypatch):
    """As where another program slows the machine down just while it is timed."""

    class Begun(Exception):
        pass

    def train(recipe):
        begun.append(recipe.updates)
        raise Begun

    begun = []
    monkeypatch.setattr(demo, "_evaluation_seconds", lambda *_: 1e6)
    monkeypatch.setattr(demo, "_update_seconds", lambda *_: 0.1)
    monkeypatch.setattr(teacher, "train", train)
    with pytest.raises(Begun):
        demo.train_all(demo.Options(out=tmp_path / "out", device="cpu"), "digits", demo.Clock(600))
    half = 0.5 * 600 * (1 - demo.RESERVE) * demo.SHARES["teacher"] / 0.1
    assert 0.9 * half < begun[0] <= half
