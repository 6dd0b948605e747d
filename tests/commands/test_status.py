"""What `fastdiff status` and `fastdiff plot` tell of a run, whenever it died; the command told continues it."""

import json
import math
import os
import runpy
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from common import TINY
from PIL import Image
from run_folders import NOW, age, begin, log, make_stage2, make_teacher, save

import fastdiff.status
from fastdiff import checkpoint, cli, distributed, figures, plot
from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.errors import UserError
from fastdiff.run import Log, Run
from fastdiff.status import duration
from fastdiff.unet import PRESETS as UNETS
from train import commands, encoder, loop, sid, stage1, stage2, teacher, two_student

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def status(run: Path, **how) -> dict:
    return asdict(fastdiff.status.status(Run(run), **how))


def describe(found: dict) -> str:
    return fastdiff.status.describe(fastdiff.status.Status(**found))


def read_log(path: Path) -> list[dict]:
    return Log(path).rows()


# --- where it is ---


def test_a_run_under_way(tmp_path):
    run = make_teacher(tmp_path, updates=1000, log_every=50)
    log(run, "teacher", *range(50, 751, 50))
    folder = save(run, "teacher", 700)
    age(run, 42)
    found = status(run, now=NOW)
    assert (found["state"], found["recipe"], found["name"]) == ("running", "train.teacher", "teacher")
    assert (found["update"], found["updates"], found["kimg"], found["share"]) == (750, 1000, 48, 0.75)
    assert found["seconds_left"] == 250 * 64 / 32 and found["seconds_since"] == 42
    assert found["losses"][-1] == 1 / 750 and found["checkpoint"] == str(folder) and found["damage"] is None
    text = describe(found)
    for part in (f"{run}: running", "42 s ago", "update 750 of 1000", "75.0%", "8 min", "0.001333", str(folder)):
        assert part in text, text
    assert text.splitlines()[-1] == f"  if it stops  {found['command']}"
    assert f"--updates 1000 --log-every 50 --out {run} --resume" in found["command"]


@pytest.mark.parametrize(
    ("rows", "seconds", "state"),
    [
        (0, 1700, "running"),
        (0, 1900, "stopped"),
        (3, 290, "running"),
        (3, 310, "running"),
        (3, 990, "running"),
        (3, 1010, "stopped"),
    ],
)
def test_a_run_that_is_quiet_for_too_long_has_stopped(tmp_path, rows, seconds, state):
    """A row of the log takes 100 · 64 / 32 = 200 s; five of them may be missing."""
    run = make_teacher(tmp_path)
    log(run, "teacher", *range(100, 100 * rows + 1, 100))
    age(run, seconds)
    assert status(run, now=NOW)["state"] == state


def test_any_file_of_the_run_is_a_sign_of_life_and_a_picture_of_it_is_none(tmp_path):
    run = make_teacher(tmp_path)
    log(run, "teacher", 100)
    for place in ("samples-teacher-1.png", "checkpoint-0000100", ".checkpoint-0000200.writing/model.json"):
        (run / place).parent.mkdir(exist_ok=True)
        (run / place).write_text("")
        age(run, 10_000)
        assert status(run, now=NOW)["state"] == "stopped"
        os.utime(run / place, (NOW - 5, NOW - 5))
        assert status(run, now=NOW)["state"] == "running", place
    age(run, 10_000)
    (run / "curves.png").write_text("")
    assert status(run, now=NOW)["state"] == "stopped"


def test_a_stopped_run_has_left_what_its_checkpoint_lacks(tmp_path):
    run = make_teacher(tmp_path, updates=1000)
    log(run, "teacher", 100, 200, 300)
    save(run, "teacher", 250)
    age(run, 10_000)
    found = status(run, now=NOW)
    assert found["update"] == 300 and found["seconds_left"] == 750 * 64 / 32
    assert "continue     python -m train.teacher" in describe(found)


def test_a_run_is_finished_once_its_last_update_is_saved(tmp_path):
    run = make_teacher(tmp_path, updates=200)
    log(run, "teacher", 100, 200)
    save(run, "teacher", 100)
    age(run, 10_000)
    assert status(run, now=NOW)["state"] == "stopped"
    save(run, "teacher", 200)
    found = status(run, now=NOW)
    assert (found["state"], found["share"], found["seconds_left"]) == ("finished", 1, 0)
    assert "python -m" not in describe(found)


def test_rounds(tmp_path):
    run = make_stage2(tmp_path)
    age(run, 0)
    found = status(run, now=NOW)
    assert (found["name"], found["round"], found["rounds"], found["share"]) == ("steps-8", 1, 4, 0)
    log(run, "steps-8", 50, 100)
    save(run, "steps-8", 100)
    age(run, 0)
    found = status(run, now=NOW)  # it was not yet kept as steps-8
    assert (found["name"], found["update"], found["updates"], found["share"]) == ("steps-8", 100, 100, 100 / 800)
    for name in ("steps-8", "steps-4"):
        checkpoint.save(run / name, Denoiser(DenoiserConfig(TINY, kind="stage2")))
    found = status(run, now=NOW)  # and now the checkpoint of its round is in nobody's way
    assert (found["name"], found["round"], found["update"], found["share"]) == ("steps-2", 3, 0, 200 / 800)
    log(run, "steps-4", 100)
    log(run, "steps-2", 100, 200)
    for folder in run.glob("checkpoint-*"):
        folder.rename(tmp_path / folder.name)
    save(run, "steps-2", 150)
    age(run, 0)
    found = status(run, now=NOW)
    assert (found["update"], found["updates"], found["share"]) == (200, 300, 400 / 800)
    assert found["seconds_left"] == 400 * 64 / 32 and "steps-2 (round 3 of 4)" in describe(found)
    age(run, 10_000)
    assert status(run, now=NOW)["seconds_left"] == 450 * 64 / 32  # it stopped, and goes on from update 150
    for name in ("steps-2", "steps-1"):
        checkpoint.save(run / name, Denoiser(DenoiserConfig(TINY, kind="stage2")))
    for folder in run.glob("checkpoint-*"):
        folder.rename(tmp_path / folder.name)
    found = status(run, now=NOW)
    assert (found["state"], found["share"], found["checkpoint"]) == ("finished", 1, str(run / "steps-1"))


def test_scores_and_alarms(tmp_path):
    run = make_teacher(tmp_path)
    log(run, "teacher", 100)
    rows = [{"fd": 0.75}, {"fd": 0.5}, {"fd": 0.625, "spread": 0.25, "alarms": ["class 3 varies little"]}]
    lines = [json.dumps({"run": "teacher", "update": 50 * n + 50} | row) for n, row in enumerate(rows)]
    (run / "scores.jsonl").write_text("\n".join(lines) + "\n")
    found = status(run, now=NOW)
    assert found["last_scores"]["fd"] == 0.625 and found["best_fd"] == 0.5
    for part in ("FD 0.625 (best 0.5), variety 0.25", "at update 150", "alarm        class 3 varies little"):
        assert part in describe(found)


# --- runs that died ---


def test_a_row_that_was_cut_off_and_rows_that_were_trained_again(tmp_path):
    run = make_teacher(tmp_path)
    log(run, "teacher", 100, 200, 300, loss=1.0)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"run": "teacher", "update": 400, "los\xff')  # killed here, and continued from update 100
    log(run, "teacher", 150, loss=2.0)  # its first row hangs on to the half one, and is lost with it
    log(run, "teacher", 200, 250, loss=3.0)
    rows = read_log(run / "metrics.jsonl")
    assert [(row["update"], row["loss"]) for row in rows] == [(100, 1.0), (200, 3.0), (250, 3.0)]
    assert status(run, now=NOW)["update"] == 250
    (run / "metrics.jsonl").write_text('[1]\n3\n{"update": 3}\n\nnull\n')
    assert read_log(run / "metrics.jsonl") == [] and status(run, now=NOW)["update"] == 0
    assert read_log(run / "nothing.jsonl") == []


def test_a_run_that_died_at_once(tmp_path):
    found = status(make_teacher(tmp_path), now=NOW)
    assert (found["update"], found["checkpoint"], found["seconds_left"], found["losses"]) == (0, None, None, [])
    assert "checkpoint   none" in describe(found)


def test_damage_is_told_and_the_checkpoint_before_is_named(tmp_path, capsys):
    run = make_teacher(tmp_path)
    for update in (100, 200):
        path = save(run, "teacher", update) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    assert status(run, now=NOW)["checkpoint"] == str(run / "checkpoint-0000100")
    assert str(path) in capsys.readouterr().err
    (run / "checkpoint-0000100" / "state.json").unlink()
    found = status(run, now=NOW)
    assert found["checkpoint"] is None and str(path) in found["damage"] and found["damage"] in describe(found)


def test_damage_of_a_finished_round_is_told(tmp_path):
    run = make_stage2(tmp_path)
    path = checkpoint.save(run / "steps-8", Denoiser(DenoiserConfig(TINY, kind="stage2"))) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    assert str(path) in status(run, now=NOW)["damage"]


# --- the command ---

MADE = Path("runs/made")
COMMANDS = {
    "nothing": ("train.teacher", teacher.Options(out=MADE)),
    "many options": (
        "train.teacher",
        teacher.Options(
            out=MADE,
            flip=True,
            betas=(0.5, 0.75),
            dropout=0.0,
            lr=1e-5,
            data="my data/it's",
            compile=True,
            unet=replace(UNETS["digits"], channels=8, head_width=None, scale_shift=False, attention_resolutions=(4, 2)),
        ),
    ),
    "a preset": (
        "train.teacher",
        teacher.Options(out=MADE, **(teacher.PRESETS["cifar10"] | {"preset": "cifar10", "flip": False, "lr": 2e-3})),
    ),
    "a preset's network": (
        "train.teacher",
        teacher.Options(out=MADE, **(teacher.PRESETS["cifar10-edm"] | {"preset": "cifar10-edm"})),
    ),
    "stage1": ("train.stage1", stage1.Options(out=MADE, teacher=Path("t"), guidance_range=(0.0, 2.5), clip=False)),
    "stage2": ("train.stage2", stage2.Options(out=MADE, teacher=Path("t"), sampler="stochastic", last_updates=7)),
    "sid": (
        "train.sid",
        sid.Options(out=MADE, teacher=Path("t"), class_frequencies=(1.0, 2.5), guidance_range=(1.0, 1.0)),
    ),
    "sid's preset": (
        "train.sid",
        sid.Options(out=MADE, teacher=Path("t"), **(sid.PRESETS["cifar10"] | {"preset": "cifar10", "data": None})),
    ),
    "encoder": ("train.encoder", encoder.Options(out=MADE, teacher=Path("t"), end_steps=4)),
    "two students": ("train.two_student", two_student.Options(out=MADE, teacher=Path("t"), guidance=2.0)),
}


@pytest.mark.parametrize("old", [False, True], ids=["", "old"])
@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_has_all_options_of_the_run(tmp_path, monkeypatch, name, old):
    monkeypatch.chdir(tmp_path)
    recipe, options = COMMANDS[name]
    words = shlex.split(status(begin(options, recipe, old=old), now=NOW)["command"])
    assert words[:3] == ["python", "-m", recipe] and words[-1] == "--resume"
    taken, module = [], sys.modules[recipe]
    monkeypatch.setattr(sys, "argv", words[2:])
    cli.run(taken.append, module.Options, module.PRESETS)
    kept = {"preset": None} if old else {}  # an old run's command has every option instead
    assert asdict(taken[0]) == asdict(replace(options, resume=True, **kept))
    if name == "nothing" and not old:
        assert words[3:] == ["--out", "runs/made", "--resume"]


def test_a_run_that_was_moved_and_one_of_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    run = make_teacher(tmp_path)
    moved = run.rename(tmp_path / "moved here")
    command = status(moved, now=NOW)["command"]
    assert command.startswith("torchrun --nproc_per_node 8 -m train.teacher ")
    assert shlex.split(command)[-3:] == ["--out", str(moved), "--resume"]


@pytest.mark.parametrize("how", ["log", "model", "neither"])
def test_the_recipe_of_an_older_run_is_told_from_its_log_or_its_model(tmp_path, how):
    run = begin(stage1.Options(out=tmp_path / "run", teacher=Path("t")), None)
    if how == "log":
        log(run, "stage1", 10)
    elif how == "model":
        save(run, "stage1", 10, kind="stage1")
    found = status(run, now=NOW)
    assert found["recipe"] == (None if how == "neither" else "train.stage1")
    assert (found["command"] is None) == (how == "neither")
    assert "recipe       unknown" in describe(found) or how != "neither"


def test_only_recipes_are_imported(tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('the trap was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    run = begin(teacher.Options(out=tmp_path / "run"), "trap")
    assert status(run, now=NOW)["command"] is None


def test_the_command_continues_a_run_that_died(tmp_path, monkeypatch, capsys):
    """The whole way, with the files as the training loop writes them."""
    monkeypatch.chdir(tmp_path)
    options = teacher.Options(
        out=Path("run"), unet=TINY, updates=6, save_every=2, log_every=1, batch_size=8, device="cpu"
    )

    def die(model, path, seed):
        if "0000004" in path.name:
            raise RuntimeError("no more power")

    monkeypatch.setattr(loop, "preview", die)
    with pytest.raises(RuntimeError):
        teacher.train(options)
    found = status(Path("run"))
    assert (found["update"], found["updates"], found["state"]) == (4, 6, "running")  # it died just now
    assert found["recipe"] == "train.teacher" and Path(found["checkpoint"]).name == "checkpoint-0000004"
    monkeypatch.setattr(loop, "preview", lambda *_: None)
    monkeypatch.setattr(sys, "argv", shlex.split(found["command"])[2:])
    runpy.run_module("train.teacher", run_name="__main__", alter_sys=True)
    found = status(Path("run"))
    assert (found["update"], found["state"]) == (6, "finished")
    assert [row["update"] for row in read_log(Path("run/metrics.jsonl"))] == [1, 2, 3, 4, 5, 6]
    plot.main(plot.Options(runs=(Path("run"),), out=Path("curves.png")))
    assert Image.open("curves.png").size[0] > 600


# --- as a command ---


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["fastdiff", *map(str, words)])
    code = 0
    try:
        commands.main()
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_several_runs_in_words_and_as_json(tmp_path, monkeypatch, capsys):
    runs = [make_teacher(tmp_path), make_stage2(tmp_path)]
    log(runs[0], "teacher", 100)
    code, out, _ = call(monkeypatch, capsys, "status", *runs)
    assert code == 0 and [block.split(":")[0] for block in out.split("\n\n")] == list(map(str, runs))
    code, out, _ = call(monkeypatch, capsys, "status", *runs, "--json")
    found = json.loads(out)
    assert code == 0 and [one["run"] for one in found] == list(map(str, runs)) and found[0]["update"] == 100


def test_a_watched_run_is_told_again_until_it_ends(tmp_path, monkeypatch, capsys):
    run, pauses = make_teacher(tmp_path, updates=300), []

    def train_meanwhile(seconds):
        pauses.append(seconds)
        n = 100 * len(pauses)
        log(run, "teacher", n)
        if n == 300:
            save(run, "teacher", n)

    monkeypatch.setattr(fastdiff.status.time, "sleep", train_meanwhile)
    code, out, _ = call(monkeypatch, capsys, "status", run, "--watch", 5)
    told = [line.split("update ")[1].split(",")[0] for line in out.splitlines() if line.startswith("  at ")]
    assert code == 0 and pauses == [5, 5, 5] and told == ["0 of 300", "100 of 300", "200 of 300", "300 of 300"]
    assert out.count(f"{run}: running") == 3 and out.count(f"{run}: finished") == 1
    code, _, error = call(monkeypatch, capsys, "status", run, "--watch", 0)
    assert code == 2 and error == "error: --watch must be positive, got 0.0\n"


def test_runs_in_a_folder_are_found_and_what_is_none_stops_nothing(tmp_path, monkeypatch, capsys):
    """After `make demo`, `fastdiff.status runs/*` once said that runs/demo is no run, and no more."""
    alone = make_teacher(tmp_path, out=tmp_path / "runs/alone")
    inside = [make_teacher(tmp_path, out=tmp_path / "runs/demo" / name) for name in ("sid", "teacher")]
    (tmp_path / "runs/notes").mkdir()
    (tmp_path / "runs/results.json").write_text("mine")
    code, out, err = call(monkeypatch, capsys, "status", *sorted((tmp_path / "runs").iterdir()))
    assert code == 0 and [block.split(":")[0] for block in out.split("\n\n")] == list(map(str, [alone, *inside]))
    warnings = err.splitlines()
    assert [line.split(" holds")[0] for line in warnings] == [
        f"warning: {tmp_path / 'runs' / name}" for name in ("notes", "results.json")
    ]
    assert call(monkeypatch, capsys, "status", tmp_path / "runs")[1].count("\n\n") == 0  # one below, no deeper


@pytest.mark.parametrize("command", ["status", "plot", "report"])
@pytest.mark.parametrize("content", [None, "", "[]", '{"options": 3}', '{"options": {"updates": "many"}}'])
def test_what_is_no_run_is_named(tmp_path, monkeypatch, capsys, command, content):
    (tmp_path / "mine").mkdir()
    if content is not None:
        (tmp_path / "mine" / "config.json").write_text(content)
    code, _, err = call(monkeypatch, capsys, command, tmp_path / "mine")
    assert code == 2 and err.startswith(f"error: {tmp_path / 'mine'}") and len(err.splitlines()) == 1


@pytest.mark.parametrize("command", ["status", "plot", "report"])
def test_no_run_at_all(monkeypatch, capsys, command):
    code, _, err = call(monkeypatch, capsys, command)
    assert code == 2 and "no run is named" in err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (59.4, "59 s"), (61, "1 min"), (3599, "1 h 0 min"), (11520, "3 h 12 min"), (190_800, "2 d 5 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# --- curves ---


def test_curves_of_rounds_follow_one_another_with_a_gap(tmp_path):
    run = make_stage2(tmp_path)
    for name, updates in (("steps-8", (50, 100)), ("steps-4", (100,)), ("steps-2", (150, 300))):
        log(run, name, *updates, batch_size=20)
    whole, quarters = plot.curves((run,))
    expected = [(1, 1 / 50), (2, 1 / 100), (2, math.nan), (4, 1 / 100), (4, math.nan), (7, 1 / 150), (10, 1 / 300)]
    assert whole["loss"][str(run)] == pytest.approx(np.array(expected), nan_ok=True)
    assert list(whole) == ["loss", "gradient norm", "learning rate"]
    assert [panel[str(run)][0] for panel in quarters.values()] == [(1, 4 / 50), (1, 3 / 50), (1, 2 / 50), (1, 1 / 50)]


def test_curves_of_several_runs_have_what_each_has(tmp_path):
    runs = make_teacher(tmp_path), make_stage2(tmp_path)
    log(runs[0], "teacher", 10, 20, fake_loss=-1.0)
    log(runs[1], "steps-8", 10, loss_quarters=None, loss=math.nan)
    rows = [{"run": "teacher", "update": n, "images": 64 * n, "fd": n} for n in (10, 20)]
    (runs[0] / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"run": "x", "update": 1}]))
    whole, quarters = plot.curves(runs)
    assert whole["Fréchet distance"] == {str(runs[0]): [(0.64, 10), (1.28, 20)]}
    assert list(whole["gradient norm"]) == list(map(str, runs))
    for panel in (whole["loss"], whole["loss of the fake score"], *quarters.values()):
        assert list(panel) == [str(runs[0])]


def test_a_run_without_a_log_has_no_curves(tmp_path):
    with pytest.raises(UserError, match="logged nothing yet"):
        plot.curves((make_teacher(tmp_path),))


def test_the_picture(tmp_path, monkeypatch):
    drawn, subplots = [], figures._subplots
    monkeypatch.setattr(figures, "_subplots", lambda *a, **o: drawn.append(subplots(*a, **o)) or drawn[-1])
    x = np.linspace(1, 100, 200)
    whole = {
        "loss": {"a": np.stack([x, 1 / x], 1), "b": np.stack([x, np.full(200, 2.0)], 1)},
        "learning rate": {"a": np.stack([x, 1 - x / 100], 1)},
        "loss of the fake score": {"b": [(1, 2.0), (2, math.nan), (3, -2.0)]},
    }
    figures.plot_curves([whole, {"loss, lowest quarter": {"b": [(1, 1.0), (2, 0.5)]}}], tmp_path / "curves.png")
    figure, axes = drawn[0]
    assert [axis.get_yscale() for axis in axes[0]] == ["log", "linear", "asinh"]
    assert [axis.axison for axis in axes[1]] == [True, False, False]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert len(axes[0][0].lines) == 4  # each faint, and its average
    assert axes[0][0].lines[3].get_ydata() == pytest.approx(np.full(200, 2.0))
    assert Image.open(tmp_path / "curves.png").size[0] > 1000


def test_a_moving_average_leaves_out_what_is_not_there():
    found = figures._moving_average(np.array([1.0, 2.0, 6.0, math.nan, 4.0, 8.0]), 3)
    assert found == pytest.approx(np.array([1.5, 3.0, 4.0, math.nan, 6.0, 6.0]), nan_ok=True)


def test_a_picture_that_exists_is_not_replaced_unasked(tmp_path, monkeypatch, capsys):
    run = make_teacher(tmp_path)
    log(run, "teacher", 100)
    out = tmp_path / "curves.png"
    out.write_text("mine")
    code, _, err = call(monkeypatch, capsys, "plot", run, "--out", out)
    assert code == 2 and "--overwrite" in err and out.read_text() == "mine"
    code, said, _ = call(monkeypatch, capsys, "plot", run, "--out", out, "--overwrite")
    assert code == 0 and "7 panels of 1 run\n" in said and Image.open(out).size[0] > 1000
