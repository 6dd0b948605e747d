"""`train.compare` with far too small networks: every row, table and figure is there, and nothing is done twice."""

import json
import re
import shlex
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import command_lines
import numpy as np
import pytest
import torch
import tyro
from command_lines import assert_refused
from common import TINY, snapshot
from PIL import Image

from fastdiff import checkpoint, data, figures, samplers
from fastdiff.denoiser import with_guidance
from fastdiff.errors import UserError
from fastdiff.generate import Sampling, generate
from fastdiff.metrics import Row
from fastdiff.schedule import CosineSchedule
from fastdiff.translate import Pair
from train import compare, loop, stage2, teacher
from train.report import methods as lines
from train.report import pictures, tables, timing
from train.updater import Updater

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")

STEPS, TEACHER_STEPS, STRENGTHS = (8, 4, 2, 1), (2, 1), (0.0, 1.0)
EVERYWHERE = [("stage 1 and 2", "D"), ("stage 1 and 2, stochastic", "S"), ("stage 1 alone", "D")]
AT_ONE = [("fixed w = 1", "D"), ("two students, w = 1", "D")]
TEACHER = [("guided teacher, DDIM", "D"), ("guided teacher, ancestral", "S")]
RUNS = ["teacher", "stage1", "stage2", "stochastic", "fixed-w1-stage1", "fixed-w1", "two-student-w1", "sid", "encoder"]
DIGITS = SimpleNamespace(dataset=SimpleNamespace(class_names=tuple("0123456789")), floor=0.1)
PAIRS = ["distilled encoder and decoder"] + [
    f"{model}, DDIM, {calls} the calls".replace("as many the", "as many")
    for model in ("stage 1", "guided teacher")
    for calls in ("as many", "twice")
]


class Counted:
    """What was trained and scored, in order."""

    def __init__(self, patch):
        self.updates, self.rows, self.stop_after = [], [], None
        update, evaluate = Updater.update, lines.evaluate

        def counted_update(updater, batch):
            self.updates.append(updater.options.out.name)
            return update(updater, batch)

        def counted_evaluate(model, reference, sampling, *, name, num):
            if len(self.rows) == self.stop_after:
                raise KeyboardInterrupt
            self.rows.append((name, sampling.steps, sampling.guidance))
            return evaluate(model, reference, sampling, name=name, num=num)

        patch.setattr(Updater, "update", counted_update)
        patch.setattr(lines, "evaluate", counted_evaluate)

    def clear(self):
        self.updates.clear(), self.rows.clear()
        self.stop_after = None


@pytest.fixture(scope="module")
def counted():
    """Small networks and few steps, for all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(teacher.PRESETS, "digits", {"unet": TINY})
        patch.setattr(compare, "BATCH_SIZE", 16)
        patch.setattr(compare, "START_STEPS", 16)
        patch.setattr(compare, "STUDENT_STEPS", STEPS)
        patch.setattr(compare, "RECONSTRUCTED", 8)
        patch.setattr(timing, "BATCH", 4)
        patch.setattr(loop, "preview", lambda *args, **kwargs: None)
        yield Counted(patch)


@pytest.fixture(scope="module")
def made(counted, tmp_path_factory, extractor):
    """The options of a comparison that was interrupted after seven rows, and then made whole. Read it only."""
    options = compare.Options(
        out=tmp_path_factory.mktemp("compare") / "deep" / "out",
        guidance=STRENGTHS,
        teacher_steps=TEACHER_STEPS,
        num=16,
        updates=(4, 4, 2),
        device="cpu",
    )
    counted.stop_after = 7
    with pytest.raises(KeyboardInterrupt):
        compare.main(options)
    first = json.loads((options.out / "results.json").read_text())
    trained, scored = list(counted.updates), list(counted.rows)
    assert not (options.out / "report.md").exists()
    counted.clear()
    compare.main(options)
    results = json.loads((options.out / "results.json").read_text())
    assert results["rows"][:7] == first["rows"] and len(first["rows"]) == 7
    assert set(trained) == set(RUNS) and not counted.updates
    assert not set(scored) & set(counted.rows)
    counted.clear()
    return options


@pytest.fixture
def results(made):
    return json.loads((made.out / "results.json").read_text())


@pytest.fixture
def report(made):
    return (made.out / "report.md").read_text()


def table(report, title):
    """The cells of the table under a title, row by row, the header first."""
    lines = report.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [cells[0], *cells[2:]]


def rows_expected():
    return {
        **{(name, steps): (letter, STRENGTHS) for name, letter in EVERYWHERE for steps in STEPS},
        **{(name, steps): (letter, (1.0,)) for name, letter in AT_ONE for steps in STEPS},
        **{(name, steps): (letter, STRENGTHS) for name, letter in TEACHER for steps in TEACHER_STEPS},
        ("SiD", 1): ("D", STRENGTHS),
    }


# --- what is there ---


def test_every_method_is_a_row_at_every_step_count_and_strength(results):
    expected = {(name, steps, w) for (name, steps), (_, strengths) in rows_expected().items() for w in strengths}
    found = [(row["model"], row["steps"], row["guidance"]) for row in results["rows"]]
    assert len(found) == len(set(found)) and set(found) == expected
    letters = {(row["model"], row["letter"]) for row in results["rows"]}
    assert letters == {*EVERYWHERE, *AT_ONE, *TEACHER, ("SiD", "D")}
    samplers = {row["model"]: row["sampler"] for row in results["rows"]}
    assert samplers.pop("stage 1 and 2, stochastic") == "stochastic"
    assert samplers.pop("SiD") == "one_step"
    assert samplers.pop("guided teacher, ancestral") == "ancestral" and set(samplers.values()) == {"ddim"}
    for row in results["rows"]:
        twice = row["model"].startswith(("guided teacher", "two students")) and row["guidance"]
        assert row["nfe"] == row["steps"] * (2 if twice else 1)
        assert row["num"] == 16 and row["fd"] > 0 and 1 <= row["score"] <= 10 and row["images_per_second"] > 0


def test_every_model_was_distilled_from_the_same_teacher(made):
    def option(name, key):
        return json.loads((made.out / name / "config.json").read_text())["options"].get(key)

    assert {path.name for path in made.out.iterdir() if path.is_dir()} == {*RUNS, "pictures"}
    of = {name: Path(option(name, "teacher")).name for name in RUNS if name != "teacher"}
    assert of == {
        "stage1": "teacher",
        "stage2": "stage1",
        "stochastic": "stage1",
        "fixed-w1-stage1": "teacher",
        "fixed-w1": "fixed-w1-stage1",
        "two-student-w1": "teacher",
        "encoder": "stage1",
        "sid": "stage1",
    }
    assert option("stage1", "guidance_range") == [0, 4] and option("fixed-w1-stage1", "guidance_range") == [1, 1]
    assert option("stochastic", "sampler") == "stochastic" and option("two-student-w1", "guidance") == 1
    for name in ("stage2", "stochastic", "fixed-w1", "two-student-w1"):
        assert {path.name for path in (made.out / name).glob("steps-*")} == {f"steps-{n}" for n in STEPS}
    assert [path.name for path in (made.out / "encoder").glob("steps-*")] == ["steps-8"]


@pytest.mark.parametrize(("title", "key", "digits"), [("FD", "fd", 2), ("Score", "score", 2)])
def test_the_tables_have_a_row_for_each_method_and_steps_and_a_column_for_each_strength(
    results, report, title, key, digits
):
    header, *lines = table(report, title)
    assert header == ["method", "D/S", "steps", "calls", "w = 0", "w = 1"]
    found = {(name, int(steps)): (letter, cells) for name, letter, steps, _, *cells in lines}
    expected = rows_expected()
    assert len(lines) == len(found) and found.keys() == expected.keys()
    values = {(row["model"], row["steps"], row["guidance"]): row[key] for row in results["rows"]}
    for (name, steps), (letter, cells) in found.items():
        assert letter == expected[name, steps][0]
        assert cells == [
            f"{values[name, steps, w]:.{digits}f}" if w in expected[name, steps][1] else "" for w in STRENGTHS
        ]
    for name, steps, calls in [("stage 1 and 2", 8, 8), ("guided teacher, DDIM", 2, 4), ("two students, w = 1", 4, 8)]:
        assert [name, str(calls)] in [[line[0], line[3]] for line in lines if int(line[2]) == steps]


def test_every_row_is_timed_where_its_calls_differ(results, report):
    timing = results["timing"]
    expected = {(name, steps, w) for (name, steps), (_, strengths) in rows_expected().items() for w in strengths}
    found = {(row["model"], row["steps"], row["guidance"]): row["seconds"] for row in timing["rows"]}
    assert found.keys() == expected and min(found.values()) > 0
    assert timing["batch"] == 4 and len(timing["rounds"]) == 5 and {row["times"] for row in timing["rows"]} == {5}
    header, *lines = table(report, "Wall-clock")
    assert header == ["method", "D/S", "steps", "calls", "images/s, w > 0", "÷", "images/s, w = 0", "÷"]
    assert [line[:4] for line in lines] == [line[:4] for line in table(report, "FD")[1:]]
    for name, _, steps, _, *cells in lines:
        for w, (speed, ratio) in zip((1.0, 0.0), (cells[:2], cells[2:]), strict=True):
            seconds = found.get((name, int(steps), w))
            assert (speed == ratio == "") if seconds is None else float(speed) == pytest.approx(4 / seconds, abs=0.5)
            slowest = found["guided teacher, DDIM", 2, w]
            assert seconds is None or float(ratio) == pytest.approx(slowest / seconds, abs=0.005)


def test_the_headline_sets_a_student_against_the_most_steps_of_the_teacher(results, report):
    header, *lines = table(report, "Headline")
    assert header == ["w", "teacher's FD", "score", "student", "steps", "FD", "score", "calls ÷", "time ÷"]
    assert [line[0] for line in lines] == ["0", "1"] and "with 2 DDIM steps" in report
    for line, found in zip(lines, tables.headline(results), strict=True):
        assert line[1] == f"{found['teacher']['fd']:.2f}"
        assert line[3] == ("none" if found["student"] is None else found["student"]["model"])


def test_reconstruction_is_measured_at_equal_and_at_twice_the_calls(results, report):
    found = {(row["pair"], row["guidance"]): row for row in results["reconstruction"]}
    assert set(found) == {(pair, w) for pair in PAIRS for w in STRENGTHS}
    for (pair, _), row in found.items():
        assert row["calls"] == (32 if "twice" in pair else 16) and row["rmse"] > 0
    header, *lines = table(report, "Reconstruction")
    assert header == ["pair", "w = 0: calls", "error", "w = 1: calls", "error"]
    assert [line[0] for line in lines] == PAIRS
    for name, *cells in lines:
        assert cells == [
            text for w in STRENGTHS for text in (str(found[name, w]["calls"]), f"{found[name, w]['rmse']:.4f}")
        ]


def test_reconstruction_is_of_test_images_as_their_own_class(made, results, monkeypatch):
    """Written out for two pairs; DDIM's is the better one of those with and without the limit."""
    seen = []
    monkeypatch.setattr(Pair, "translate", lambda self, *given, **how: seen.append(given) or given[0])
    compare.reconstruction(made)
    monkeypatch.undo()
    test = data.load("digits", "test")
    at = torch.arange(8) * len(test) // 8
    x, label = data.to_float(torch.from_numpy(test.images)[at]), torch.from_numpy(test.labels)[at]
    assert len(label.unique()) > 3
    for images, source, target, _ in seen:  # networks as young as these hardly heed the class
        assert torch.equal(images, x) and torch.equal(source, label) and torch.equal(target, label)
    assert len(seen) == 9 * len(STRENGTHS)  # four pairs twice

    def error(encoder, decoder, w, steps, clip):
        encoder, decoder = (with_guidance(checkpoint.load(made.out / name)) for name in (encoder, decoder))
        with torch.no_grad():
            z = samplers.encode(encoder, x, label, w, steps, schedule=CosineSchedule())
            z = samplers.ddim(decoder, z, label, w, steps, schedule=CosineSchedule(), clip=clip)
        return float((z - x).square().mean().sqrt())

    found = {(row["pair"], row["guidance"]): row["rmse"] for row in results["reconstruction"]}
    for w in STRENGTHS:
        assert found[PAIRS[0], w] == pytest.approx(error("encoder/steps-8", "stage2/steps-8", w, 8, None), abs=2e-5)
        steps = 8 if w else 16  # of two calls and of one
        best = min(error("teacher", "teacher", w, steps, clip) for clip in (None, 1.0))
        assert found["guided teacher, DDIM, twice the calls", w] == pytest.approx(best, abs=2e-5)


def test_the_report_says_how_it_was_made(report, results):
    line = next(line for line in report.splitlines() if "python -m train.compare" in line)
    for option in ("--preset digits", "--num 16", "--seed 0"):
        assert option in line
    assert results["reference"]["extractor"] in report


def test_the_command_in_the_report_makes_the_same_report(made, report):
    command = re.search(r"`python -m train\.compare (.*?)`", report)[1]
    assert tyro.cli(compare.Options, args=[*shlex.split(command), "--out", str(made.out), "--device", "cpu"]) == made


def test_the_figures_are_not_blank(made, report):
    names = ["quality-vs-steps.png", "trade-off.png", "samples-w0.png", "samples-w1.png"]
    assert sorted(path.name for path in made.out.glob("*.png")) == sorted(names)
    assert re.findall(r"\]\((.*?)\)", report) == names
    for name in names:
        with Image.open(made.out / name) as picture:
            assert picture.width > 500 and picture.height > 100
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 30


def test_panels_show_what_their_titles_say(made, monkeypatch):
    """The same noise and classes in each, at the strength of the picture's name."""
    saved = {}
    monkeypatch.setattr(figures, "save_panels", lambda panels, path, **_: saved.update({path.name: dict(panels)}))
    compare.draw({"rows": []}, replace(made, methods=("teacher", "stochastic")), DIGITS)
    assert set(saved) == {"samples-w0.png", "samples-w1.png"}
    label, ids = torch.arange(10).repeat_interleave(5), torch.arange(5).repeat(10)
    for name, w in (("samples-w0.png", 0.0), ("samples-w1.png", 1.0)):
        assert list(saved[name]) == ["guided teacher, DDIM, 2"] + [f"stage 1 and 2, stochastic, {n}" for n in (8, 4, 1)]
        for title, folder, sampler, steps in (
            ("guided teacher, DDIM, 2", "teacher", "ddim", 2),
            ("stage 1 and 2, stochastic, 4", "stochastic/steps-4", "stochastic", 4),
        ):
            model = with_guidance(checkpoint.load(made.out / folder))
            sampling = Sampling(guidance=w, steps=steps, sampler=sampler)
            images = torch.cat(list(generate(model, label, sampling, noise_ids=ids)))
            torch.testing.assert_close(saved[name][title], data.to_float(data.to_uint8(images)))
    # Networks as young as these hardly heed w.
    monkeypatch.setattr(pictures, "load", lambda path, columns: np.full(5 * columns, path.name))
    compare.draw({"rows": []}, replace(made, methods=("teacher", "stochastic")), DIGITS)
    assert {*saved["samples-w0.png"][title]} == {"stochastic-4-w0.png"}
    assert {*saved["samples-w1.png"][title]} == {"stochastic-4-w1.png"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pictures_reconstruction_and_timing_have_the_precision_of_the_scores(
    made, results, monkeypatch, tmp_path, precision
):
    """Once, they were float32 beside scores of bfloat16."""
    seen = []

    real = Pair.translate

    def drawn(model, labels, sampling, **others):
        seen.append(sampling.precision)
        return generate(model, labels, sampling, **others)

    def translated(*arguments, precision, **others):
        seen.append(precision)
        return real(*arguments, precision=precision, **others)

    monkeypatch.setattr(timing, "generate", drawn)
    monkeypatch.setattr(pictures, "generate", drawn)
    monkeypatch.setattr(Pair, "translate", translated)
    monkeypatch.setattr(figures, "save_panels", lambda panels, *_, **__: None)
    options = replace(made, precision=precision, methods=("teacher", "deterministic"), guidance=(1.0,))
    monkeypatch.setattr(pictures, "FOLDER", tmp_path)  # where there is none yet
    compare.draw({"rows": []}, options, DIGITS)
    times = compare.time_all(options, results["rows"])
    errors = compare.reconstruction(options)
    assert seen == [precision] * (6 + 6 * len(times["rows"]) + 9)  # pictures; timing, with warming up; pairs
    exact = [row for row in results["reconstruction"] if row["guidance"] == 1]
    assert errors == exact or precision != "fp32"


# --- running again ---


def contents(made):
    """The rows, and content and time of the runs' files but for config.json, which each run writes anew."""
    runs = {name: snapshot(made.out / name) for name in RUNS}
    rows = json.loads((made.out / "results.json").read_text())["rows"]
    return rows, {name: files for name, files in runs.items() if files.pop("config.json")}


def test_running_again_repeats_nothing(made, counted, monkeypatch):
    before, drawn = contents(made), []
    monkeypatch.setattr(compare, "draw", lambda *arguments: drawn.append(arguments))
    counted.clear()
    compare.main(made)
    assert contents(made) == before and len(drawn) == 1
    assert not counted.updates and not counted.rows


def test_a_folder_that_was_moved_or_has_another_path_goes_on(made, counted, tmp_path, monkeypatch):
    """Each run names its teacher by a path, which was compared as text."""
    moved = tmp_path / "else" / "where"
    shutil.copytree(made.out, moved)
    counted.clear()
    compare.main(replace(made, out=moved))
    monkeypatch.chdir(tmp_path)
    compare.main(replace(made, out=Path("else/where")))
    assert not counted.updates and not counted.rows
    with pytest.raises(UserError, match=r"--teacher was .*, is .*fixed-w1-stage1"):
        replaced = {"teacher": made.out / "fixed-w1-stage1", "preset": "digits", "device": "cpu", "resume": True}
        stage2.train(stage2.Options(out=moved / "stage2", **(replaced | stage2.PRESETS["digits"])))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num": 20}, "'num': 16.*'num': 20"),
        ({"seed": 1}, "--seed was 0, is 1|'seed': 0.*'seed': 1"),
        ({"updates": (6, 4, 2)}, "updates"),
        ({"updates": (4, 4, 3)}, "updates"),
        ({"precision": "bf16"}, "precision"),
        ({"guidance": (0.0, 5.0)}, "--guidance"),
    ],
    ids=["num", "seed", "updates of the teacher", "updates of a round", "precision", "wider guidance"],
)
def test_other_options_in_the_same_folder_are_refused(made, monkeypatch, change, said):
    """Rows of two settings in one table would be compared although they cannot be."""
    before = contents(made)
    for place, name in ((Updater, "update"), (lines, "evaluate"), (compare, "reconstruction")):
        monkeypatch.setattr(place, name, lambda *args, **how: pytest.fail("it went on"))
    with pytest.raises(UserError, match=said):
        compare.main(replace(made, **change))
    assert contents(made) == before


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '"text"', "{}", b"\xff\xfe", '{"options": {"preset": "digits", "num": 16, "seed": 0}}']
)
def test_broken_results_are_refused_and_kept(made, monkeypatch, content):
    path = made.out / "results.json"
    whole = path.read_bytes()
    broken = content if isinstance(content, bytes) else content.encode()
    try:
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"results\.json"):
            compare.main(made)
        assert path.read_bytes() == broken
    finally:
        path.write_bytes(whole)


# --- some methods, and others later ---

FEW = {"methods": ("teacher", "deterministic"), "guidance": (1.0,), "teacher_steps": (2,)}


def test_methods_are_trained_and_scored_as_asked_and_others_added_later(made, counted, tmp_path):
    options = replace(made, out=tmp_path / "few", **FEW)
    counted.clear()
    compare.main(options)
    assert set(counted.updates) == {"teacher", "stage1", "stage2"}
    assert Counter(name for name, _, _ in counted.rows) == {"stage 1 and 2": 4, "guided teacher, DDIM": 1}
    first, report = json.loads((options.out / "results.json").read_text()), (options.out / "report.md").read_text()
    assert "reconstruction" not in first and "## Reconstruction" not in report
    assert "--methods teacher deterministic --guidance 1 --teacher-steps 2`" in report
    pictures = ["quality-vs-steps.png", "trade-off.png", "samples-w1.png"]
    assert re.findall(r"\]\((.*?)\)", report) == pictures
    assert {path.name for path in options.out.glob("*.png")} == set(pictures)

    counted.clear()
    compare.main(replace(options, methods=("two-student", "encoder"), fixed_guidance=(2.0,)))
    assert set(counted.updates) == {"two-student-w2", "encoder"}
    assert Counter(name for name, _, _ in counted.rows) == {"two students, w = 2": 4}
    both, report = json.loads((options.out / "results.json").read_text()), (options.out / "report.md").read_text()
    assert both["rows"][:5] == first["rows"] and len(both["reconstruction"]) == 5
    assert {row["model"] for row in both["timing"]["rows"]} == {"two students, w = 2"}  # times of one run, or none
    assert "--methods teacher deterministic two-student encoder --guidance 1 --fixed-guidance 2 " in report
    assert len(table(report, "FD")) == 1 + 4 + 1 + 4 and len(table(report, "Reconstruction")) == 1 + 5


def test_an_encoder_alone_is_a_report_of_reconstruction(made, counted, tmp_path):
    counted.clear()
    compare.main(replace(made, out=tmp_path / "out", methods=("encoder",)))
    assert set(counted.updates) == {"teacher", "stage1", "stage2", "encoder"} and not counted.rows
    report = (tmp_path / "out/report.md").read_text()
    assert len(table(report, "Reconstruction")) == 1 + 5 and "](" not in report and "Wall-clock" not in report
    assert "--methods encoder --guidance 0 1`" in report


# --- timing, with a clock of its own ---


@pytest.fixture
def clock(monkeypatch):
    """Sampling that only takes time: `slowdown(how many went before)` seconds a network call."""
    clock = SimpleNamespace(now=0.0, sampled=[], slowdown=lambda before: 1.0)

    def generate(folder, num, sampling):
        steps, w = sampling.steps, sampling.guidance
        calls = steps * (2 if w and folder.name == "teacher" else 1)
        clock.now += calls * clock.slowdown(len(clock.sampled))
        clock.sampled.append((folder.name, steps, w))
        yield torch.zeros(num)

    monkeypatch.setattr(timing, "generate", generate)
    monkeypatch.setattr(lines, "with_guidance", lambda folder: folder)
    monkeypatch.setattr(lines.checkpoint, "load", lambda folder, device: folder)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def timed(tmp_path, teacher_steps):
    """What time_all says of the teacher and of the deterministic students, and seconds by (name, steps, w)."""
    options = compare.Options(
        out=tmp_path,
        methods=("teacher", "deterministic"),
        guidance=(4.0, 0.0, 1.0),
        teacher_steps=teacher_steps,
        device="cpu",
    )
    rows = [row(line.name, line.steps, w, line.letter) for line in compare.methods(options) for w in line.guidance]
    times = compare.time_all(options, rows)
    return times, {(row["model"], row["steps"], row["guidance"]): row["seconds"] for row in times["rows"]}


def test_slow_rows_are_timed_once_between_rounds_of_the_others(tmp_path, clock):
    timing, seconds = timed(tmp_path, (1024, 512, 256, 2))
    fast = [(f"steps-{n}", n, w) for n in reversed(compare.STUDENT_STEPS) for w in (0, 1)]
    fast += [("teacher", 2, w) for w in (0, 1)]
    slow = {("teacher", n, w) for n in (256, 512, 1024) for w in (0, 1)}
    warm, rest = clock.sampled[: len(fast) + len(slow)], clock.sampled[len(fast) + len(slow) :]
    assert max(steps for _, steps, _ in warm) == 2 and {(n, w) for n, _, w in warm} == {(n, w) for n, _, w in rest}
    assert Counter(rest) == {**dict.fromkeys(fast, 5), **dict.fromkeys(slow, 1)}
    for after in (2, 2, 1, 1, 0):  # slow rows after each of the same five rounds
        assert rest[: len(fast)] == fast and slow.issuperset(rest[len(fast) : len(fast) + after])
        rest = rest[len(fast) + after :]
    assert seconds["guided teacher, DDIM", 1024, 1] == 2048 and seconds["guided teacher, DDIM", 1024, 0] == 1024
    assert seconds["stage 1 and 2", 1, 1] == 1 and timing["rounds"] == [2 * sum(compare.STUDENT_STEPS) + 6] * 5


def test_an_interruption_of_the_timing_leaves_a_report(made, monkeypatch):
    """It is the last thing, and takes minutes."""
    report, results = made.out / "report.md", made.out / "results.json"
    before = report.read_text(), results.read_text()
    report.unlink()
    monkeypatch.setattr(compare, "draw", lambda *_: None)
    monkeypatch.setattr(compare, "time_all", lambda *_: pytest.fail("interrupted"))
    with pytest.raises(pytest.fail.Exception):
        compare.main(made)
    assert (report.read_text(), results.read_text()) == before


def test_a_burst_of_other_work_does_not_count_but_is_seen(tmp_path, clock):
    _, quiet = timed(tmp_path, (8, 2))
    rows = len(quiet)
    clock.sampled.clear()
    clock.slowdown = lambda before: 3.0 if 2 * rows <= before < 3 * rows else 1.0  # after warming up and one round
    timing, busy = timed(tmp_path, (8, 2))
    assert busy == quiet and timing["rounds"][1] == 3 * timing["rounds"][0] == 3 * timing["rounds"][4]


@pytest.mark.parametrize("guidance", [(0.0,), (2.0, 0.5), (0.5, 0.0, 2.0)])
def test_rows_are_timed_with_and_without_guidance_where_they_are_scored(guidance):
    assert compare._timed_strengths(guidance) == {1: [0.0], 2: [0.5], 3: [0.0, 0.5]}[len(guidance)]


# --- what a report makes of unusual options: from rows alone, without training ---


def row(name, steps, w, letter="D", **values):
    scores = {"fd": 1 + w, "score": 2.0, "nfe": steps, "images_per_second": 10.0}
    what = {"model": name, "sampler": "ddim", "steps": steps, "guidance": w, "num": 16, "seed": 0, "letter": letter}
    return what | scores | values


def scored(*arguments, **values):
    found = row(*arguments, **values)
    found.pop("letter")
    return Row(**found)


def results_of(rows, **others):
    reference = {"extractor": "some", "half_against_half_fd": 0.5, "score": 9.0}
    made = {"preset": "digits", "num": 16, "seed": 0, "precision": "fp32", "updates": [1, 2, 3]}
    return {"rows": rows, "reference": reference, "options": made, **others}


def small_report(tmp_path, strengths, fixed):
    rows = [row("stage 1 and 2", steps, w) for steps in (2, 1) for w in strengths]
    rows += [row(f"fixed w = {w:g}", steps, w) for steps in (2, 1) for w in fixed]
    reconstruction = [{"pair": "distilled", "guidance": w, "calls": 16, "rmse": w / 10} for w in strengths]
    return tables.report(results_of(rows, reconstruction=reconstruction), tmp_path)


@pytest.mark.parametrize(
    ("strengths", "fixed"),
    [((0.0, 1.0, 2.0), (1.0,)), ((2.0, 0.0, 1.0), (1.0,)), ((0.0, 2.0), (1.0,)), ((0.0, 4.0), ())],
    ids=["usual", "not in order", "fixed at another strength", "none fixed"],
)
def test_errors_of_reconstruction_stand_under_their_strength(tmp_path, strengths, fixed):
    header, line = table(small_report(tmp_path, strengths, fixed), "Reconstruction")
    found = dict(zip(header[1::2], line[2::2], strict=False))
    for w in strengths:
        assert found[f"w = {w:g}: calls"] == f"{w / 10:.4f}"


def test_a_report_shows_only_pictures_that_are_there(tmp_path):
    for name in ("trade-off.png", "samples-w2.png", "samples-w3.png"):
        (tmp_path / name).touch()
    text = small_report(tmp_path, (0.0, 2.0), (1.0,))
    assert re.findall(r"\]\((.*?)\)", text) == ["trade-off.png", "samples-w2.png"]


def test_the_headline_takes_the_fewest_steps_that_are_good_enough(tmp_path):
    teacher, student, stochastic = (tables.NAMES[key] for key in ("teacher", "deterministic", "stochastic"))
    rows = [
        row(teacher, 1024, 0.0, fd=1.0),
        row(teacher, 64, 0.0, fd=0.9),
        row(student, 1, 0.0, fd=1.101),
        row(student, 2, 0.0, fd=1.1),
        row(student, 4, 0.0, fd=0.8),
        row(stochastic, 2, 0.0, "S", fd=1.05),
        row("stage 1 alone", 1, 0.0, fd=0.1),
        row("fixed w = 0", 1, 0.0, fd=0.1),
        row(teacher, 1024, 1.0, fd=0.5, nfe=2048),
        row(student, 1, 1.0, fd=0.56),
        row(teacher, 1024, 2.0, fd=1.0, nfe=2048),
        row(student, 1, 2.0, fd=1.0),
        row(teacher, 64, 4.0, fd=1.0, nfe=128),
        row(student, 1, 4.0, fd=1.0),
    ]
    times = [row(teacher, 1024, 0.0, seconds=60.0), row(teacher, 1024, 1.0, seconds=110.0)]
    times += [row(stochastic, 2, 0.0, seconds=0.125), row(student, 1, 1.0, seconds=0.05)]
    timing = {"batch": 8, "device": "cpu", "threads": 1, "rounds": [1.0, 2.0], "rows": times}
    found = tables.headline(results_of(rows, timing=timing))
    at = {
        line["guidance"]: (line["student"] and (line["student"]["model"], line["student"]["steps"])) for line in found
    }
    assert at == {0.0: (stochastic, 2), 1.0: None, 2.0: (student, 1)}  # at w = 4 the teacher's most steps are missing
    assert [(line["calls"], line["seconds"]) for line in found] == [(512, 480), (None, None), (2048, 2200)]
    lines = table(tables.report(results_of(rows, timing=timing), tmp_path), "Headline")[1:]
    assert lines == [
        ["0", "1.00", "2.00", stochastic, "2", "1.05", "2.00", "512", "480"],
        ["1", "0.50", "2.00", "none", "", "", "", "", ""],
        ["2", "1.00", "2.00", student, "1", "1.00", "2.00", "2048", "2200"],
    ]
    untimed = table(tables.report(results_of(rows), tmp_path), "Headline")[1:]
    assert [line[7:] for line in untimed] == [["512", ""], ["", ""], ["2048", ""]]
    assert tables.headline(results_of(rows[2:8])) == [] and "Headline" not in tables.report(results_of([]), tmp_path)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are made, for a look at their lines."""
    made, subplots = [], figures._subplots

    def kept(*arguments, **options):
        made.append(subplots(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(figures, "_subplots", kept)
    return made


def lines_of(axis):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}


def test_quality_against_steps_has_a_line_a_method_and_a_column_a_strength(tmp_path, drawn):
    rows = [
        scored(name, steps, w, fd=steps + w + 9 * (name == "b"), score=5 - w + steps / 8 + (name == "b"))
        for name in ("a", "b")
        for steps in (4, 1, 2)
        for w in (0.0, 1.0)
    ]
    figures.plot_methods(rows[:-2], 0.1, tmp_path / "methods.png")  # b has no 2 steps
    ((_, axes),) = drawn
    for column, w in enumerate((0, 1)):
        assert axes[0][column].get_title() == f"guidance w = {w}"
        fd, score = (lines_of(axis) for axis in axes[:, column])
        assert fd["a"] == ([1, 2, 4], [1 + w, 2 + w, 4 + w]) and fd["b"] == ([1, 4], [10 + w, 13 + w])
        assert score["a"] == ([1, 2, 4], [5.125 - w, 5.25 - w, 5.5 - w]) and score["b"][1] == [6.125 - w, 6.5 - w]
    assert (axes[0][0].get_ylabel(), axes[1][0].get_ylabel()) == ("Fréchet distance", "score")


def test_the_trade_off_is_score_over_distance_with_one_colour_a_method(tmp_path, drawn):
    rows = [
        scored(name, steps, w, fd=steps + w + 9 * (name == "b"), score=5 - w)
        for name, counts in (("a", (1,)), ("b", (8, 4)), ("c", (1, 4)))
        for steps in counts
        for w in (2.0, 0.0, 1.0)
    ]
    figures.plot_trade_off(rows, tmp_path / "trade-off.png")
    ((figure, axes),) = drawn
    assert [axis.get_title() for axis in axes[0]] == ["1 step", "4 steps", "8 steps"]
    one, four, eight = map(lines_of, axes[0])
    assert one == {"a": ([1, 2, 3], [5, 4, 3]), "b, 8 steps": ([17, 18, 19], [5, 4, 3]), "c": ([1, 2, 3], [5, 4, 3])}
    assert set(four) == {"b", "b, 8 steps", "c"} and four["b"][0] == [13, 14, 15] and set(eight) == {"b"}
    colors = {(line.get_label()[0], line.get_color()) for axis in axes[0] for line in axis.lines}
    assert len(colors) == 3 and len({color for _, color in colors}) == 3
    assert [text.get_text() for text in figure.legends[0].texts] == ["a", "b, 8 steps", "c", "b"]


def test_figures_of_a_single_strength_have_no_warning(tmp_path, recwarn):
    """There is no curve over w, and matplotlib warns of an empty legend."""
    rows = [scored(name, steps, 1.0) for name in ("a", "b") for steps in (4, 1)]
    figures.plot_methods(rows, 0.1, tmp_path / "methods.png")
    figures.plot_trade_off(rows, tmp_path / "trade-off.png")
    assert (tmp_path / "trade-off.png").is_file() and not recwarn.list


def test_figures_of_a_teacher_with_many_steps_alone(tmp_path):
    rows = [scored("guided teacher, DDIM", steps, w) for steps in (64, 32) for w in (0.0, 1.0)]
    figures.plot_trade_off(rows, tmp_path / "trade-off.png")
    assert (tmp_path / "trade-off.png").is_file()


# --- mistakes ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num", 1], ["--num 1", "at least 2"]),
        (["--guidance", 0, -1], ["--guidance", "≥ 0"]),
        (["--guidance", "nan"], ["--guidance", "≥ 0"]),
        (["--fixed-guidance", "inf"], ["--fixed-guidance", "≥ 0"]),
        (["--guidance"], ["--guidance", "at least one"]),
        (["--methods"], ["--methods", "two-student"]),
        (["--teacher-steps"], ["--teacher-steps", "at least one"]),
        (["--teacher-steps", 4, 0], ["--teacher-steps", "positive"]),
        (["--updates", 4, 0, 2], ["--updates", "(4, 0, 2)"]),
        (["--device", "tpu"], ["--device tpu"]),
    ],
)
def test_options_without_sense_are_refused_before_any_work(run, monkeypatch, arguments, said):
    monkeypatch.setattr("fastdiff.evaluate.Reference.load", lambda *a, **k: pytest.fail("it began"))
    assert_refused(run("compare", "--device", "cpu", "--out", "o", *arguments), *said)
    assert not Path("o").exists()


def test_a_negative_seed_is_refused(run, extractor):
    assert_refused(run("compare", "--device", "cpu", "--out", "o", "--seed", -1), "--seed", "-1")


def test_an_unknown_preset_is_refused(run):
    result = run("compare", "--preset", "cifar10", "--out", "o")
    assert result.code == 2 and "--preset" in result.err and "Traceback" not in result.err
    assert not Path("o").exists()


def test_an_unknown_method_is_refused(run):
    result = run("compare", "--methods", "teacher", "distilled", "--out", "o")
    assert result.code == 2 and "distilled" in result.err and "Traceback" not in result.err
    assert not Path("o").exists()


def test_an_output_that_is_a_file_is_refused(run):
    Path("file").write_text("mine")
    assert_refused(run("compare", "--device", "cpu", "--out", "file"), "--out", "file")
    assert_refused(run("compare", "--device", "cpu", "--out", "file/below"), "--out", "file")
    assert Path("file").read_text() == "mine"


def test_a_folder_of_something_else_is_refused(run, tmp_path, counted, extractor):
    (tmp_path / "o/teacher").mkdir(parents=True)
    (tmp_path / "o/teacher/notes.txt").write_text("mine")
    before = snapshot(tmp_path / "o")
    assert_refused(run("compare", "--device", "cpu", "--out", "o"), "o/teacher", "no run of fastdiff")
    assert snapshot(tmp_path / "o") == before
