"""`fastdiff.compare` with far too small networks: every row, table and figure is there, and nothing is done twice."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import test_command_lines as command_lines
from common import TINY, snapshot
from PIL import Image
from test_command_lines import assert_refused

from fastdiff import figures
from fastdiff.errors import UserError
from train import compare, encoder, loop, stage1, stage2, teacher, two_student

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")

STEPS, TEACHER_STEPS, STRENGTHS = (8, 4, 2, 1), (2, 1), (0.0, 1.0)
EVERYWHERE = [("stage 1 and 2", "D"), ("stage 1 and 2, stochastic", "S"), ("stage 1 alone", "D")]
AT_ONE = [("fixed w = 1", "D"), ("two students, w = 1", "D")]
TEACHER = [("guided teacher, DDIM", "D"), ("guided teacher, ancestral", "S")]
RUNS = ["teacher", "stage1", "stage2", "stochastic", "fixed-w1-stage1", "fixed-w1", "two-student-w1", "encoder"]
PAIRS = ["distilled encoder and decoder"] + [
    f"{model}, DDIM, {calls} the calls".replace("as many the", "as many")
    for model in ("stage 1", "guided teacher") for calls in ("as many", "twice")
]  # fmt: skip


class Counted:
    """What was trained and scored, in order."""

    def __init__(self, patch):
        self.updates, self.rows, self.stop_after = [], [], None
        update, evaluate = loop.Updater.update, compare.evaluate

        def counted_update(updater, batch):
            self.updates.append(updater.options.out.name)
            return update(updater, batch)

        def counted_evaluate(model, reference, **how):
            if len(self.rows) == self.stop_after:
                raise KeyboardInterrupt
            self.rows.append((how["name"], how["steps"], how["guidance"]))
            return evaluate(model, reference, **how)

        patch.setattr(loop.Updater, "update", counted_update)
        patch.setattr(compare, "evaluate", counted_evaluate)

    def clear(self):
        self.updates.clear(), self.rows.clear()
        self.stop_after = None


@pytest.fixture(scope="module")
def counted():
    """Small networks and few steps, for all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(teacher.PRESETS, "digits", {"unet": TINY, "batch_size": 16})
        patch.setitem(stage1.PRESETS, "digits", {"batch_size": 16})
        for module in (stage2, encoder, two_student):
            patch.setattr(module, "PRESETS", {"digits": {"batch_size": 16, "start_steps": 16}})
        patch.setattr(compare, "STUDENT_STEPS", STEPS)
        patch.setattr(compare, "RECONSTRUCTED", 8)
        patch.setattr(loop, "preview", lambda *args, **kwargs: None)
        yield Counted(patch)


@pytest.fixture(scope="module")
def made(counted, tmp_path_factory, extractor):
    """The options of a comparison that was interrupted after seven rows, and then made whole. Read it only."""
    options = compare.Options(
        out=tmp_path_factory.mktemp("compare") / "deep" / "out", guidance=STRENGTHS, teacher_steps=TEACHER_STEPS,
        num=16, updates=(4, 4, 2), device="cpu",
    )  # fmt: skip
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
    }


# --- what is there ---


def test_every_method_is_a_row_at_every_step_count_and_strength(results):
    expected = {(name, steps, w) for (name, steps), (_, strengths) in rows_expected().items() for w in strengths}
    found = [(row["model"], row["steps"], row["guidance"]) for row in results["rows"]]
    assert len(found) == len(set(found)) and set(found) == expected
    letters = {(row["model"], row["letter"]) for row in results["rows"]}
    assert letters == {*EVERYWHERE, *AT_ONE, *TEACHER}
    samplers = {row["model"]: row["sampler"] for row in results["rows"]}
    assert samplers.pop("stage 1 and 2, stochastic") == "stochastic"
    assert samplers.pop("guided teacher, ancestral") == "ancestral" and set(samplers.values()) == {"ddim"}
    for row in results["rows"]:
        twice = row["model"].startswith(("guided teacher", "two students")) and row["guidance"]
        assert row["nfe"] == row["steps"] * (2 if twice else 1)
        assert row["num"] == 16 and row["fd"] > 0 and 1 <= row["score"] <= 10 and row["images_per_second"] > 0


def test_every_model_was_distilled_from_the_same_teacher(made):
    def option(name, key):
        return json.loads((made.out / name / "config.json").read_text())["options"].get(key)

    assert {path.name for path in made.out.iterdir() if path.is_dir()} == set(RUNS)
    of = {name: Path(option(name, "teacher")).name for name in RUNS if name != "teacher"}
    assert of == {
        "stage1": "teacher", "stage2": "stage1", "stochastic": "stage1", "fixed-w1-stage1": "teacher",
        "fixed-w1": "fixed-w1-stage1", "two-student-w1": "teacher", "encoder": "stage1",
    }  # fmt: skip
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
    assert table(report, "Images per second")[0] == header


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


def test_the_report_says_how_it_was_made(report, results):
    line = next(line for line in report.splitlines() if "python -m fastdiff.compare" in line)
    for option in ("--preset digits", "--num 16", "--seed 0"):
        assert option in line
    assert results["reference"]["extractor"] in report


def test_the_command_in_the_report_makes_the_same_report(report):
    """With every option that is not a default."""
    command = re.search(r"`(python -m fastdiff\.compare.*?)`", report)[1]
    for option in ("--updates 4 4 2", "--teacher-steps 2 1", "--guidance 0"):
        assert option in command


def test_the_figures_are_not_blank(made, report):
    names = ["quality-vs-steps.png", "trade-off.png", "samples-w0.png", "samples-w1.png"]
    assert sorted(path.name for path in made.out.glob("*.png")) == sorted(names)
    assert re.findall(r"\]\((.*?)\)", report) == names
    for name in names:
        with Image.open(made.out / name) as picture:
            assert picture.width > 500 and picture.height > 100
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 30


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


@pytest.mark.parametrize(
    ("change", "said"),
    [({"num": 20}, "'num': 16.*'num': 20"), ({"seed": 1}, "--seed was 0, is 1|'seed': 0.*'seed': 1"),
     ({"updates": (6, 4, 2)}, "updates"), ({"updates": (4, 4, 3)}, "updates"), ({"precision": "bf16"}, "precision"),
     ({"guidance": (0.0, 5.0)}, "--guidance")],
    ids=["num", "seed", "updates of the teacher", "updates of a round", "precision", "wider guidance"],
)  # fmt: skip
def test_other_options_in_the_same_folder_are_refused(made, monkeypatch, change, said):
    """Rows of two settings in one table would be compared although they cannot be."""
    before = contents(made)
    for place, name in ((loop.Updater, "update"), (compare, "evaluate"), (compare, "reconstruction")):
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


# --- what a report makes of unusual options: from rows alone, without training ---


def row(name, steps, w, letter="D"):
    return {"model": name, "steps": steps, "guidance": w, "letter": letter, "fd": 1 + w, "score": 2.0, "nfe": steps,
            "images_per_second": 10.0}  # fmt: skip


def small_report(tmp_path, strengths, fixed):
    rows = [row("stage 1 and 2", steps, w) for steps in (2, 1) for w in strengths]
    rows += [row(f"fixed w = {w:g}", steps, w) for steps in (2, 1) for w in fixed]
    reconstruction = [{"pair": "distilled", "guidance": w, "calls": 16, "rmse": w / 10} for w in strengths]
    reference = {"extractor": "some", "half_against_half_fd": 0.5, "score": 9.0}
    options = compare.Options(out=tmp_path, guidance=strengths, fixed_guidance=fixed)
    return compare.report({"rows": rows, "reconstruction": reconstruction, "reference": reference}, options)


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


def test_a_report_shows_only_pictures_that_are_made(tmp_path):
    text = small_report(tmp_path, (0.0, 2.0), (1.0,))
    assert re.findall(r"samples-w(.*?)\.png", text) == ["0", "2"]


def test_figures_of_a_single_strength_have_no_warning(tmp_path, recwarn):
    """There is no curve over w, and matplotlib warns of an empty legend."""
    rows = [row(name, steps, 1.0) for name in ("a", "b") for steps in (4, 1)]
    figures.plot_methods(rows, 0.1, tmp_path / "methods.png")
    figures.plot_trade_off(rows, tmp_path / "trade-off.png")
    assert (tmp_path / "trade-off.png").is_file() and not recwarn.list


# --- mistakes ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num", 1], ["--num 1", "at least 2"]),
        (["--guidance", 0, -1], ["--guidance", "≥ 0"]),
        (["--guidance", "nan"], ["--guidance", "≥ 0"]),
        (["--fixed-guidance", "inf"], ["--fixed-guidance", "≥ 0"]),
        (["--guidance"], ["--guidance", "at least one"]),
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
