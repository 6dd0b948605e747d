"""What `fastdiff report` gathers of runs and comparisons in any state, and that its page is one whole file."""

import base64
import errno
import io
import json
import math
import re
import tomllib
from pathlib import Path

import command_lines
import numpy as np
import pytest
import torch
from command_lines import assert_refused
from PIL import Image
from run_folders import draw, log, make_comparison, make_stage2, make_teacher, save, score

from fastdiff.errors import UserError
from train.report import command, gather, page, pictures, tables

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def shown(path: Path) -> dict:
    """The JSON in a page, as others would read it."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())[1])


def pixels(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


def content(*folders: Path) -> dict:
    return page.content(folders, Path("report.html"))


# --- comparisons ---


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_comparison(tmp_path_factory.mktemp("made") / "comparison")


def test_every_picture_is_what_sampling_makes_of_the_same_noises_and_classes(made):
    (found,) = content(made.out)["comparisons"]
    grids = {(one["model"], one["steps"], one["guidance"]): one["png"] for one in found["pictures"]["grids"]}
    assert grids.keys() == {(one.name, one.steps, w) for one in made.methods for w in (0.0, 0.5, 1.0, 4.0)}
    for line, png in grids.items():
        assert np.array_equal(pixels(png), made.drawn(*line)), line
    assert len(set(grids.values())) == 20


def test_pictures_are_drawn_once_and_can_be_read_back(made, monkeypatch):
    name, classes = pictures.file(made.out, made.methods[0], 1.0), 10
    images = pictures.load(name, columns=classes)
    assert images.shape == (50, 1, 8, 8) and images.min() >= -1 and images.max() <= 1
    first = made.drawn(made.methods[0].name, 8, 1.0)[:8, 8:16]  # the first noise of the second class
    assert np.array_equal(((images[1, 0] + 1) * 127.5).round().numpy().astype(np.uint8), first)
    titled = pictures.panels({"title": made.methods[0]}, 1.0, made.out, made.results["pictures"])
    assert torch.equal(titled[0][1][5], images[1])  # there, a class is a row
    monkeypatch.setattr(pictures, "generate", lambda *_, **__: pytest.fail("it sampled again"))
    names = made.results["pictures"]["class_names"]
    again = pictures.draw(made.methods, made.options, made.out, names, strengths=(0.0, 0.5, 1.0, 4.0))
    assert again == made.results["pictures"]


def test_of_many_classes_ten_are_shown():
    assert pictures.shown_classes(1000).tolist() == list(range(0, 1000, 100))
    assert pictures.shown_classes(3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (3.0, "stage 1 and 2 with 2 network calls an image is as near to the real images (Fréchet distance 4.10) as"),
        (
            1.0,
            "no student is as near to the real images as the guided teacher with 16 network calls an image (2.00); the",
        ),
    ],
)
def test_the_headline_is_one_sentence_for_each_strength(tmp_path, teacher, said):
    made = make_comparison(tmp_path / "out", pictured=(), teacher=teacher)
    lines = {line["guidance"]: line["text"] for line in content(made.out)["comparisons"][0]["headline"]}
    assert lines.keys() == {0.0, 1.0, 4.0} and lines[1.0].startswith(f"At w = 1, {said}")
    assert ("8 times fewer calls" in lines[1.0]) == (teacher == 3.0)
    made.save(rows=[row for row in made.results["rows"] if "teacher" in row["model"]])
    assert "no student to compare" in content(made.out)["comparisons"][0]["headline"][0]["text"]


def test_labels_say_what_was_measured_and_what_was_not(made):
    (found,) = content(made.out)["comparisons"]
    text = " ".join(found["labels"])
    for part in ("classifier1/digits", "99.0%", "100 samples (seed 0)", "1438 images", "not FID", "0.42", "9.90"):
        assert part in text
    assert "Not measured" in text and "Drawn, but not scored: w = 0.5." in text
    assert found["made_by"].startswith("python -m train.compare --preset digits --num 100")


def test_a_result_without_pictures_and_one_without_rows(made, tmp_path):
    for name, changes, said in (("a", {"pictures": {}}, "No pictures were kept"), ("b", {"rows": []}, "Nothing has")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(made.results | changes))
        (found,) = content(tmp_path / name)["comparisons"]
        assert found["pictures"] is None and said in " ".join(found["labels"])


def test_rows_without_numbers_are_left_out_and_counted(made, tmp_path):
    first, second, *rows = made.results["rows"]
    rows = [first | {"fd": math.nan}, second | {"steps": None}, *rows]
    (tmp_path / "results.json").write_text(json.dumps(made.results | {"rows": rows}))
    (found,) = content(tmp_path)["comparisons"]
    assert found["rows"] == made.results["rows"][2:] and "2 rows" in found["labels"][-1]


def test_the_committed_results_are_a_page():
    """Of before pictures were kept."""
    results = Path(__file__).parents[2] / "docs/results"
    found = content(*(results / name for name in ("digits", "compare-digits", "compare-fashion-mnist")))
    assert len(found["comparisons"]) == 3 and not found["notes"]
    assert "SiD with 1 network call an image is as near" in found["comparisons"][0]["headline"][1]["text"]


# --- runs, in any state ---


def nothing_yet(folder):
    make_teacher(folder)


def one_update(folder):
    log(make_teacher(folder, updates=1), "teacher", 1)


def running(folder):
    made = make_teacher(folder)
    log(made, "teacher", *range(100, 1001, 100))
    draw(made, "teacher", 100, 200)


def killed(folder):
    log(made := make_teacher(folder), "teacher", 100)
    (made / "metrics.jsonl").open("ab").write(b'{"run": "teacher", "upd\xff')
    (made / "samples-teacher-0000100.png").write_bytes(b"\x89PNG cut off")
    (made / "samples-teacher-0000200.png").write_bytes(b"")


def scored(folder):
    log(made := make_teacher(folder), "teacher", 100, loss=math.nan, loss_quarters=[1.0, math.inf, 2.0, 3.0])
    score(
        made,
        "teacher",
        100,
        fd=2.0,
        spread=0.1,
        alarms=["class 3 varies little"],
        scores=[{"guidance": 1.0, "fd": 2.0, "score": 9.0}],
    )
    save(made, "teacher", 100)


@pytest.mark.parametrize(
    ("make", "curves", "film", "scores"),
    [(nothing_yet, 0, 0, 0), (one_update, 5, 0, 0), (running, 5, 2, 0), (killed, 5, 1, 0), (scored, 6, 0, 1)],
)
def test_a_run_in_any_state_is_shown_as_far_as_it_is(tmp_path, make, curves, film, scores):
    make(tmp_path)
    page.write(tmp_path / "page.html", [tmp_path / "teacher"])
    (found,) = shown(tmp_path / "page.html")["runs"]
    assert (len(found["curves"]), len(found["film"]), len(found["scores"])) == (curves, film, scores)
    assert found["state"] == "running" and "teacher" in found["status"] and found["about"]["seed"] == "0"
    if scores:
        assert found["alarms"] == ["teacher, update 100: class 3 varies little"]
        assert found["scores"][0]["score, w = 1"] == 9.0


def test_quarters_of_the_noise_range_are_lines_of_one_plot(tmp_path):
    log(make_teacher(tmp_path), "teacher", 100, 200)
    curves = {panel["title"]: panel["lines"] for panel in content(tmp_path / "teacher")["runs"][0]["curves"]}
    quarters = curves["loss by quarter of the noise range"]
    assert [line["points"] for line in quarters] == [[[6.4, n / 100], [12.8, n / 200]] for n in (4, 3, 2, 1)]


def test_rounds_follow_one_another_in_curves_and_film(tmp_path):
    made = make_stage2(tmp_path)
    for name in ("steps-8", "steps-4"):
        log(made, name, 50, 100)
        draw(made, name, 100)
    (found,) = content(made)["runs"]
    assert [frame["run"] for frame in found["film"]] == ["steps-8", "steps-4"]
    loss = next(panel["lines"][0]["points"] for panel in found["curves"] if panel["title"] == "loss")
    assert loss == [[3.2, 0.02], [6.4, 0.01], [6.4, None], [9.6, 0.02], [12.8, 0.01]]


def test_long_logs_are_thinned_to_means_without_moving_gaps():
    many = [(float(i), 2.0 * i) for i in range(1000)]
    kept = gather.thinned([*many[:500], (500.0, math.nan), *many[500:]])
    assert len(kept) <= gather.MOST_POINTS + 2 and [500.0, None] in kept
    assert all(y is None or y == pytest.approx(2 * x) for x, y in kept)
    assert sum(y is None for _, y in kept) == 1 and kept[0] == [1.5, 3.0]
    assert gather.thinned([]) == [] and gather.thinned([(1.0, 2.0)]) == [[1.0, 2.0]]


def test_a_long_film_is_thinned_to_what_fits_and_keeps_its_end(tmp_path, monkeypatch):
    made = make_teacher(tmp_path)
    draw(made, "teacher", *range(1, 101))
    most = max(path.stat().st_size for path in made.glob("*.png"))
    monkeypatch.setattr(page, "FILM_BYTES", 10 * most)
    (found,) = content(made)["runs"]
    updates = [frame["update"] for frame in found["film"]]
    assert len(updates) == 10 and updates[-1] == 100 and found["film_count"] == 100
    assert updates == sorted(updates) and max(np.diff(updates)) <= 11


def test_ten_runs_and_a_comparison_with_runs_are_one_page(made, tmp_path):
    inside = [make_teacher(tmp_path, out=tmp_path / f"runs/run-{i}") for i in range(10)]
    found = content(tmp_path / "runs", made.out)
    assert [one["name"] for one in found["runs"]] == [str(path) for path in inside]
    make_teacher(tmp_path, out=tmp_path / "both/teacher")
    (tmp_path / "both/results.json").write_text(json.dumps(made.results))
    found = content(tmp_path / "both")
    assert len(found["comparisons"]) == len(found["runs"]) == 1


# --- bad input ---


def test_what_is_none_is_told_on_the_page_beside_what_is_one(run, tmp_path):
    one = make_teacher(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/results.json").write_text("{}")
    result = run("report", one, tmp_path / "notes", tmp_path / "nowhere")
    assert result.code == 0 and result.err.count("warning: ") >= 2
    assert len(shown(Path("report.html"))["runs"]) == 1
    notes = shown(Path("report.html"))["notes"]
    assert any("notes/results.json is damaged" in note for note in notes) and any("nowhere" in note for note in notes)


@pytest.mark.parametrize(
    "content", ["", "[]", '"text"', '{"rows": 3}', '{"rows": [3]}', '{"rows": [], "reference": 1}', b"\xff"]
)
def test_damaged_results_alone_are_one_sentence(run, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(run("report", tmp_path / "out"), "out/results.json is damaged")
    assert not Path("report.html").exists()


@pytest.mark.parametrize("file", ["metrics.jsonl", "scores.jsonl"])
def test_a_log_of_something_else_is_one_sentence(run, tmp_path, file):
    (make_teacher(tmp_path) / file).write_text('{"run": "teacher", "update": 3, "alarms": 5}\n')
    assert_refused(run("report", tmp_path / "teacher"), tmp_path / "teacher", "leave it out")


def test_a_page_that_exists_is_not_replaced_unasked(run, tmp_path):
    one = make_teacher(tmp_path)
    Path("report.html").write_text("mine")
    assert_refused(run("report", one), "--overwrite")
    assert Path("report.html").read_text() == "mine"
    again = shown(Path("report.html"))["command"] if run("report", one, "--overwrite").code == 0 else ""
    assert again == f"fastdiff report {one} --out report.html --overwrite"


@pytest.mark.parametrize("seconds", [0, -1])
def test_a_watch_needs_time(run, tmp_path, seconds):
    assert_refused(run("report", make_teacher(tmp_path), "--watch", seconds), "--watch")


def test_a_full_disk_leaves_the_page_before(run, tmp_path, monkeypatch):
    one = make_teacher(tmp_path)
    assert run("report", one).code == 0
    before = Path("report.html").read_bytes()

    def full(path, content):
        with open(path, "wb") as file:
            file.write(content[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert_refused(run("report", one, "--overwrite"), "report.html", "No space left")
    assert Path("report.html").read_bytes() == before and not list(Path().glob(".report*"))


def test_names_with_html_in_them_end_no_script_and_start_none(made, tmp_path):
    name = "</script><img src=x onerror=alert(1)>"
    out = tmp_path / name.replace("/", "∕")
    log(make_teacher(tmp_path, out=out / "teacher"), "teacher", 100)
    rows = [row | {"model": name} for row in made.results["rows"]]
    drawn = made.results["pictures"] | {"class_names": [name]}
    (out / "results.json").write_text(json.dumps(made.results | {"rows": rows, "pictures": drawn}))
    page.write(tmp_path / "page.html", [out])
    text = (tmp_path / "page.html").read_text()
    assert text.count("<script") == text.count("</script>") == 2 and "<img" not in text
    assert shown(tmp_path / "page.html")["comparisons"][0]["rows"][0]["model"] == name


# --- watching ---


def test_a_watched_page_loads_itself_again_and_takes_a_hundredth_of_the_time(tmp_path, monkeypatch):
    one, out = make_teacher(tmp_path), tmp_path / "page.html"
    options, slept, seen = command.Options(runs=(one,), out=out, watch=2.0), [], []
    clock = iter([0.0, 0.5, 10.0, 10.001, 20.0, 20.1])  # pages that take 0.5 s, 1 ms and 0.1 s

    def sleep(seconds):
        slept.append(seconds)
        seen.append(shown(out))
        log(one, "teacher", 100 * len(slept))
        if len(slept) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", sleep)
    monkeypatch.setattr(command.time, "perf_counter", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt):
        command.main(options)
    assert slept == pytest.approx([2.0, 49.5, 2.0, 9.9])
    assert [one["reload"] for one in seen] == pytest.approx([2.0, 2.0, 49.5, 2.0])
    assert [len(one["runs"][0]["curves"]) for one in seen] == [0, 5, 5, 5]
    last = shown(out)
    assert last["reload"] is None and len(last["runs"][0]["curves"][0]["lines"][0]["points"]) == 4


# --- the file ---


def test_the_page_may_run_its_own_script_and_fetch_nothing(made, tmp_path):
    page.write(tmp_path / "page.html", [made.out])
    text = (tmp_path / "page.html").read_text()
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(script) == 1 and "default-src 'none'; img-src data:" in text
    for outside in (
        r'src="(?!data:)',
        r'href="(?!#|data:)',
        r"url\(",
        r"@import",
        r"fetch\(",
        r"XMLHttp",
        r"innerHTML",
    ):
        assert not re.search(outside, re.sub(r'id="data">.*?</script>', "", text, flags=re.DOTALL)), outside


def test_files_beside_the_code_are_part_of_the_package():
    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    packaged = {root / name.replace(".", "/") for name in settings["packages"]}
    data = {
        path
        for name, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in (root / name.replace(".", "/")).glob(pattern)
    }
    found = {path for folder in ("kernels", "fastdiff", "train") for path in (root / folder).rglob("*")}
    for path in (path for path in found if path.is_file() and "__pycache__" not in path.parts):
        assert path in data or (path.suffix == ".py" and path.parent in packaged), path


def test_sentences_count_calls():
    assert tables._calls({"nfe": 1.0}) == "1 network call an image"


def test_a_page_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        content(tmp_path)
