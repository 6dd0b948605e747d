"""Whatever ends a run, the same command line with --resume ends it bit for bit as one that nothing disturbed.

Every run is the real command line in a process of its own. So that it costs no start-up, one process imports everything
and is forked for each. `make faults` is the long form: more kills, at other moments each time. A rank that dies is in
test_distributed.py; kills, damage and full drives of single saves are in test_checkpoint.py.
"""

import ctypes
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import resource
import runpy
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import snapshot
from PIL import Image
from safetensors.torch import save

from fastdiff import checkpoint, data, evaluate, metrics
from fastdiff.losses import regression
from train import loop
from train.updater import Updater

LONG = os.environ.get("FASTDIFF_FAULTS") == "long"
SEED = int(os.environ.get("FASTDIFF_FAULTS_SEED") or (time.time_ns() % 10**6 if LONG else 0))
KILLS = 20 if LONG else 2
LIMIT = 120  # seconds that a run may take, of which it needs one

COMMON = (
    "--device cpu --batch-size 16 --ema 0.9 --dropout 0.3 --lr 1e-3 --warmup 2 --save-every 3 --log-every 2 --updates 8"
)
TINY = "--unet.channels 8 --unet.channel-mult 1 --unet.blocks 1 --unet.no-middle-attention"
ROUNDS = "--start-steps 4 --updates 5 --last-updates 5"  # two: 4 -> 2 -> 1
RECIPES = {
    "teacher": f"train.teacher {COMMON} {TINY}",
    "stage1": f"train.stage1 {COMMON} --teacher teacher",
    "stage2": f"train.stage2 {COMMON} {ROUNDS} --teacher stage1",
    "stochastic": f"train.stage2 {COMMON} {ROUNDS} --teacher stage1 --sampler stochastic",
    "encoder": f"train.encoder {COMMON} {ROUNDS} --teacher stage1",
    "two_student": f"train.two_student {COMMON} {ROUNDS} --teacher teacher",
    "sid": f"train.sid {COMMON} --teacher stage1 --data digits --score-num 16 --score-guidance 0",
}
CLOCKS = ("time", "images_per_second", "memory_gb")


# --- In the process that is forked, and in its children ------------------------------------------------------------


def serve() -> None:
    """Fork a child for each run that is asked for on stdin, and tell on stdout how it ended."""
    for name in ("sklearn.datasets", "fastdiff.cli", "fastdiff.losses.sid", "train.rounds"):
        importlib.import_module(name)  # so that no run has to wait for it
    del sys.modules["train.stage2"]  # which `common` has imported, and which is to be run
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not be forked"
    for line in sys.stdin:
        pipes = [os.pipe() for _ in range(3)]  # the child's stdout, its stderr, what it notes
        child = os.fork()
        if child == 0:
            for target, (_, writing) in enumerate(pipes, 1):
                os.dup2(writing, target)  # descriptor 3 is for the notes
            execute(**json.loads(line))
        for _, writing in pipes:
            os.close(writing)
        out, err, notes = read_all([reading for reading, _ in pipes])
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        whole = notes[: notes.rfind("\n") + 1].splitlines()
        print(json.dumps({"code": code, "out": out, "err": err, "notes": [json.loads(note) for note in whole]}))
        sys.stdout.flush()


def read_all(pipes: list[int]) -> list[str]:
    """What comes out of pipes until all are closed."""
    content, left = dict.fromkeys(pipes, b""), set(pipes)
    while left:
        for pipe in select.select(list(left), [], [])[0]:
            chunk = os.read(pipe, 1 << 16)
            content[pipe] += chunk
            if not chunk:
                left.remove(pipe)
                os.close(pipe)
    return [text.decode() for text in content.values()]


def execute(line: list[str], out: str, faults: dict[str, dict]) -> None:
    """Be `python -m LINE`, with faults."""
    signal.alarm(LIMIT)
    np.random.seed()  # from the system, as in any other new process
    code = 1
    try:
        sys.argv = line
        loop.preview = functools.partial(loop.preview, columns=1, steps=1)
        child = Child(out)
        for name, settings in faults.items():
            getattr(child, name)(**settings)
        runpy.run_module(line[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)


class Child:
    """A run that notes what it does, and to which faults happen."""

    MOMENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")  # Python tells of each before it is done

    def __init__(self, out: str):
        self.out, self.count, self.moments = out, 0, itertools.count()
        self.before = defaultdict(list)  # what happens before the n-th update of this process
        self.seen, self.signal_at = Counter(), (None, 0, 0.0)
        real_update, real_write, real_run = Updater.update, checkpoint._write, loop.run

        def update(updater, batch):
            if not updater.name:
                self.count += 1
                for action in self.before[self.count]:
                    action()
            random.random(), np.random.rand()  # as a loss may
            real_update(updater, batch)
            if not updater.name:
                note(update=updater.update_count)
            self.moment("update")

        def write(folder, contents, *rest):
            parts = [part.encode() if isinstance(part, str) else save(part) for _, part in sorted(contents.items())]
            state = json.loads(contents.get("state.json", "{}"))
            real_write(folder, contents, *rest)
            saved = [state["run"], state["update"]] if state else None
            note(saved=saved, folder=folder.name, content=hashlib.sha256(b"".join(parts)).hexdigest())

        def run(updaters, batches, options, name, **settings):
            note(run=name)
            model = real_run(updaters, batches, options, name, **settings)
            note(ran=name)
            return model

        Updater.update, checkpoint._write, loop.run = update, write, run
        sys.addaudithook(self.audit)

    def audit(self, event: str, arguments: tuple) -> None:
        if event in self.MOMENTS and (event != "open" or f"{self.out}/" in str(arguments[0])):
            self.moment(f"{event} {arguments[0]}")

    def moment(self, what: str) -> None:
        at, number, delay = self.signal_at
        here = next(self.moments) == at
        if isinstance(at, list) and at[0] in what:
            self.seen[at[0]] += 1
            here = self.seen[at[0]] == at[1]
        note(moment=what)
        if here:
            note(struck=what)
            strike = functools.partial(os.kill, os.getpid(), number)
            threading.Timer(delay, strike).start() if delay else strike()

    def at(self, update: int, *actions) -> None:
        """Do something before an update of this process; 0: now."""
        if update:
            self.before[update] += actions
        else:
            [action() for action in actions]

    def strike(self, at: int | list, number: int, delay: float = 0.0) -> None:
        """A signal at a moment, or a little later. at: its number, or [a part of its name, which of those]."""
        self.signal_at = (at, number, delay)

    def signals(self, update: int, numbers: list[int]) -> None:
        self.at(update, *(functools.partial(os.kill, os.getpid(), number) for number in numbers))

    def full_drive(self, since: int, until: int) -> None:
        """The operating system writes no byte more into any file, from one update to another."""
        usual = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.at(since, self.wait, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, usual[1])))
        self.at(until, self.look, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, usual))

    def read_only(self, since: int, until: int) -> None:
        """The run's folder is read-only from one update to another, for root too."""
        obey_permissions()
        self.at(since, self.wait, lambda: os.chmod(self.out, 0o555))
        self.at(until, self.look, lambda: os.chmod(self.out, 0o755))

    def wait(self) -> None:
        """For the first save, which goes on in the background, where there is to be one."""
        while self.count > 3 and not Path(self.out, "checkpoint-0000003").exists():
            time.sleep(0.01)

    def look(self) -> None:
        note(found=sorted(path.name for path in Path(self.out).iterdir()))

    def not_finite(self, since: int) -> None:
        real, calls = regression.teacher, itertools.count(1)
        regression.teacher = lambda *given, **more: real(*given, **more) * (math.nan if next(calls) >= since else 1)

    def distances(self, values: list[float]) -> None:
        """What the Fréchet distances are."""
        given = iter(values)
        evaluate.evaluate = lambda model, reference, how, **_: SimpleNamespace(
            guidance=how.guidance, fd=next(given), score=1.0
        )

    def vanish(self, update: int, data: str) -> None:
        """The data are moved away, and what was decoded of them is deleted."""
        cache = Path(os.environ["FASTDIFF_CACHE"])
        self.at(
            update, lambda: os.rename(data, f"{data}.gone"), lambda: [path.unlink() for path in cache.glob("*.npy")]
        )


def note(**what) -> None:
    os.write(3, json.dumps(what).encode() + b"\n")


def obey_permissions() -> None:
    """Take from this process what lets root ignore permissions: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0], sets[1] = sets[0] & ~0b110, sets[1] & ~0b110  # effective, permitted
    assert libc.capset(header, sets) == 0


# --- In the tests --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (negative: by a signal), stdout, stderr, and what it noted."""

    code: int
    out: str
    err: str
    notes: list[dict]

    def noted(self, key: str) -> list:
        return [entry[key] for entry in self.notes if key in entry]

    def told(self) -> list[str]:
        """The lines of stdout, but for those of what the data holds."""
        return [line for line in self.out.splitlines() if not line.startswith("data ")]

    def updates(self) -> list[tuple[str, int]]:
        """Every update done, as (run, number)."""
        found, run = [], None
        for entry in self.notes:
            run = entry.get("run", run)
            if "update" in entry:
                found.append((run, entry["update"]))
        return found

    def saves(self) -> dict[tuple[str, int], str]:
        """What every finished save of a resumable checkpoint held."""
        return {tuple(entry["saved"]): entry["content"] for entry in self.notes if entry.get("saved")}


class Lab:
    """Runs of the recipes in one folder, and for each the one that nothing disturbed."""

    def __init__(self, folder: Path):
        self.folder, self.undisturbed = folder, {}
        environment = os.environ | {"OMP_NUM_THREADS": "1", "FASTDIFF_CACHE": str(folder / "cache")}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (Path(__file__).parents[2], Path(__file__).parents[1])))
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            cwd=folder,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        train = data.load("digits", "train")  # an extractor that learned nothing is as good to compare with
        path = folder / "cache" / "features" / f"classifier1-{train.name}-{train.fingerprint}.safetensors"
        metrics._write(path, metrics.Classifier(1, 8, 10), 1.0)

    def run(self, recipe: str, out: str, *more: str, **faults: dict) -> Ended:
        """One process; `out` is a name in the folder."""
        for needed in ("teacher", "stage1"):
            if f"--teacher {needed}" in RECIPES[recipe]:
                self.whole(needed)
        line = [*RECIPES[recipe].split(), "--out", out, *more]
        request = {"line": line, "out": out, "faults": faults}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return Ended(**json.loads(self.server.stdout.readline()))

    def whole(self, recipe: str) -> Ended:
        """The run that nothing disturbed; its folder has the recipe's name."""
        if recipe not in self.undisturbed:
            self.undisturbed[recipe] = ended = self.run(recipe, recipe)
            assert ended.code == 0, ended.err
        return self.undisturbed[recipe]

    def finish(self, recipe: str, out: str, *more: str) -> Ended:
        """Resume a run to its end, which must be exact."""
        self.whole(recipe)
        ended = self.run(recipe, out, "--resume", *more)
        assert ended.code == 0, ended.err
        self.assert_exact(recipe, out)
        self.assert_saves(recipe, ended)
        return ended

    def assert_exact(self, recipe: str, out: str) -> None:
        """Weights, averages, optimizer, generators, logs and scores, bit for bit."""
        first, second = (finals(self.folder / name) for name in (recipe, out))
        assert first.keys() == second.keys()
        assert not [name for name in first if first[name] != second[name]]

    def assert_saves(self, recipe: str, ended: Ended) -> None:
        """Also the checkpoints that are gone by now."""
        expected = self.whole(recipe).saves()
        for key, content in ended.saves().items():
            assert expected.get(key, content) == content, key


def finals(run: Path) -> dict[str, object]:
    """What a finished run leaves: its last checkpoint or those of its rounds, the best, logs without clocks."""
    last = checkpoint.numbered(run)[-1:]
    folders = [*checkpoint.numbered(run, checkpoint.ROUND_PREFIX), *last, *run.glob("best")]
    found = {str(path.relative_to(run)): path.read_bytes() for folder in folders for path in folder.iterdir()}
    for log in run.glob("*.jsonl"):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        found[log.name] = [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]
    return found


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    made = Lab(tmp_path_factory.mktemp("lab"))
    yield made
    made.server.stdin.close()
    made.server.wait()


@pytest.fixture
def out(lab) -> str:
    """A name for a run; its folder goes with the test."""
    yield "run"
    shutil.rmtree(lab.folder / "run", ignore_errors=True)


# --- Kills ----------------------------------------------------------------------------------------------------------


def strata(whole: Ended) -> list[list[int]]:
    """Moments of a run to die in: in updates, in saves, at a round's end, before the first save, in the logs."""
    moments = whole.noted("moment")
    first_save = next(at for at, what in enumerate(moments) if checkpoint.PREFIX in what)
    kinds = (
        [at for at, what in enumerate(moments) if what == "update"],
        [at for at, what in enumerate(moments) if checkpoint.PREFIX in what],
        [at for at, what in enumerate(moments) if checkpoint.ROUND_PREFIX in what and "open" not in what]
        + [at for at, what in enumerate(moments) if "remove" in what or "rmdir" in what],
        list(range(first_save)),
        [at for at, what in enumerate(moments) if ".json" in what and checkpoint.PREFIX not in what],
    )
    return [kind for kind in kinds if kind]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_run_ends_as_if_it_had_not_been(lab, out, recipe):
    print(f"FASTDIFF_FAULTS_SEED={SEED} gives these moments again")
    rng, whole, killed = random.Random(f"{SEED} {recipe}"), lab.whole(recipe), 0
    kinds = strata(whole)
    rng.shuffle(kinds)
    order, updates = itertools.cycle(kinds), whole.updates()
    while killed < KILLS:  # a run is killed until it is finished, or until there were enough
        shutil.rmtree(lab.folder / out, ignore_errors=True)
        safe, ended = -1, None
        while ended is None or (ended.code and killed < KILLS):
            at, delay = rng.choice(next(order)), rng.choice([0.0, rng.uniform(0, 0.02)])
            ended = lab.run(recipe, out, "--resume", strike={"at": at, "number": signal.SIGKILL, "delay": delay})
            print(f"moment {at} + {delay:.3f} s: exit code {ended.code}, {ended.noted('moment')[-1:]}")
            assert ended.code in (0, -signal.SIGKILL), ended.err
            killed += ended.code != 0
            lab.assert_saves(recipe, ended)
            assert not ended.updates() or updates.index(ended.updates()[0]) > safe, "what was saved is lost"
            safe = max([safe, *(updates.index(key) for key in ended.saves())])
        lab.finish(recipe, out)


@pytest.mark.parametrize(
    ("recipe", "moment", "which"),
    [
        ("teacher", ".config.json.writing", 2),  # the folder holds nothing else
        ("teacher", "update", 3),  # a line of the log is written, no checkpoint
        ("stage2", "update", 8),  # the same, in the second round
        ("stage2", "os.remove", 8),  # a half removed checkpoint of the first round is all there is
        ("stage2", "os.rename run/checkpoint-", -1),  # the last round is finished, its checkpoints not yet removed
    ],
)
def test_a_kill_at_a_delicate_moment(lab, out, recipe, moment, which):
    if which < 0:
        which += 1 + sum(moment.replace(out, recipe) in what for what in lab.whole(recipe).noted("moment"))
    ended = lab.run(recipe, out, strike={"at": [moment, which], "number": signal.SIGKILL})
    assert ended.code == -signal.SIGKILL
    lab.finish(recipe, out)


# --- Signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "number", "update", "told"),
    [
        ("teacher", signal.SIGTERM, 4, "update 4 of 8"),
        ("stage2", signal.SIGINT, 5, "update 5 of 5"),  # the first round is finished, and the second not begun
        ("sid", signal.SIGINT, 6, "update 6 of 8"),  # which would have been saved anyway
    ],
)
def test_a_signal_saves_and_ends_with_one_line(lab, out, recipe, number, update, told):
    ended = lab.run(recipe, out, signals={"update": update, "numbers": [number]})
    assert ended.code == 0, ended.err
    assert ended.told() == [f"stopped after {told}, which is saved: go on with --resume"]
    assert len(ended.updates()) == update and ended.updates()[-1] in ended.saves()
    assert "Traceback" not in ended.err
    assert len(lab.finish(recipe, out).updates()) == len(lab.whole(recipe).updates()) - update


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_run_at_once(lab, out, number):
    ended = lab.run("teacher", out, signals={"update": 5, "numbers": [number] * 2})
    assert ended.code == 128 + number and len(ended.updates()) == 4 and not ended.told()
    lab.finish("teacher", out)


def test_a_second_signal_during_the_last_save_ends_the_run_at_once(lab, out):
    second = {"at": [".checkpoint-0000005.writing", 1], "number": signal.SIGTERM}
    ended = lab.run("teacher", out, signals={"update": 5, "numbers": [signal.SIGTERM]}, strike=second)
    assert ended.code == 128 + signal.SIGTERM and ("teacher", 5) not in ended.saves()
    lab.finish("teacher", out)


def was_training(ended: Ended) -> bool:
    """Whether the signal came between a first update and the end of its run."""
    training = False
    for entry in ended.notes:
        training = (training or "update" in entry) and "ran" not in entry
        if "struck" in entry:
            return training
    return False


@pytest.mark.parametrize("recipe", RECIPES if LONG else ["stage2"])
def test_signals_at_random_moments(lab, out, recipe):
    print(f"FASTDIFF_FAULTS_SEED={SEED} gives these moments again")
    rng, moments = random.Random(f"{SEED} {recipe} signals"), len(lab.whole(recipe).noted("moment"))
    for _ in range(KILLS):
        number = rng.choice([signal.SIGTERM, signal.SIGINT])
        ended = lab.run(recipe, out, strike={"at": rng.randrange(moments), "number": number})
        print(f"{number} at {ended.noted('moment')[-1]}: exit code {ended.code}, {ended.out!r}")
        if was_training(ended):
            assert ended.code == 0 and ended.updates()[-1] in ended.saves()
            (told,) = ended.told()
            assert told.startswith("stopped after update ")
        elif ended.noted("struck"):  # there was nothing to save, or all was saved
            ends = {130 if number == signal.SIGINT else -number}
            ends |= {0} if len(ended.noted("moment")) == moments else set()  # too late: all was done
            assert ended.code in ends, ended.err
        lab.finish(recipe, out)
        shutil.rmtree(lab.folder / out)


# --- Drives ---------------------------------------------------------------------------------------------------------


def warnings(ended: Ended) -> list[str]:
    return [line for line in ended.err.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize(
    ("fault", "reason", "costs"),
    [
        ("full_drive", "File too large", ("checkpoint-0000006", "metrics.jsonl", "samples-teacher-0000006.png")),
        ("read_only", "Permission denied", ("checkpoint-0000006", "samples-teacher-0000006.png")),
    ],
)
def test_a_drive_that_refuses_a_save_costs_a_warning_and_no_training(lab, out, fault, reason, costs):
    """From update 4 to 7 nothing can be written; lines of the log are then written later."""
    lab.whole("teacher")
    ended = lab.run("teacher", out, **{fault: {"since": 4, "until": 8}})
    assert ended.code == 0, ended.err
    for what in costs:
        assert [what in line and reason in line for line in warnings(ended)].count(True) == 1, ended.err
    assert len(warnings(ended)) == len(costs)
    (found,) = ended.noted("found")
    assert "checkpoint-0000003" in found and "checkpoint-0000006" not in found
    assert not [name for name in found if name.endswith(".writing")]
    lab.assert_exact("teacher", out)


@pytest.mark.parametrize("recipe", RECIPES if LONG else ["teacher", "stage2"])
@pytest.mark.parametrize("fault", ["full_drive", "read_only"])
def test_a_drive_that_stays_full_ends_the_run_with_one_sentence(lab, out, fault, recipe):
    ended = lab.run(recipe, out, **{fault: {"since": 4, "until": 1000}})
    (lab.folder / out).chmod(0o755)
    last = ended.err.splitlines()[-1]
    assert ended.code == 2 and last.startswith(f"error: the checkpoint {out}/") and "was not written" in last
    assert "Traceback" not in ended.err
    lab.finish(recipe, out)


@pytest.mark.parametrize("fault", ["full_drive", "read_only"])
def test_a_run_killed_on_a_full_drive_goes_on_from_its_last_save(lab, out, fault):
    ended = lab.run("teacher", out, **{fault: {"since": 4, "until": 1000}}, signals={"update": 8, "numbers": [9]})
    (lab.folder / out).chmod(0o755)
    assert ended.code == -9
    assert lab.finish("teacher", out).updates()[0] == ("teacher", 4)


@pytest.mark.parametrize("fault", ["full_drive", "read_only"])
def test_to_resume_where_nothing_can_be_written_is_refused_in_one_sentence(lab, out, fault):
    lab.run("teacher", out, signals={"update": 5, "numbers": [signal.SIGTERM]})
    before = snapshot(lab.folder / out)
    ended = lab.run("teacher", out, "--resume", **{fault: {"since": 0, "until": 1000}})
    (lab.folder / out).chmod(0o755)
    assert_refused(ended, out)
    after = snapshot(lab.folder / out)
    assert before == {name: content for name, content in after.items() if name != ".config.json.writing"}
    lab.finish("teacher", out)


def test_the_best_checkpoint_is_the_best_of_those_that_were_written(lab, out):
    """The drive is full when the generator is at its best; what the state says of `best` must be true."""
    ended = lab.run("sid", out, full_drive={"since": 5, "until": 7}, distances={"values": [3.0, 1.0, 2.0]})
    assert ended.code == 0, ended.err
    newest = lab.folder / out / "checkpoint-0000008"
    assert checkpoint.load_state(newest)[0]["best"]["update"] == 8
    model = (newest / "model.safetensors").read_bytes()
    assert (lab.folder / out / "best" / "model.safetensors").read_bytes() == model


def assert_refused(ended: Ended, *parts: str) -> None:
    """Exit code 2 and one sentence, before any update."""
    lines = ended.err.splitlines()
    assert ended.code == 2 and not ended.updates(), ended.err
    assert len(lines) == 1 and lines[0].startswith("error: ") and all(part in lines[0] for part in parts), ended.err


# --- Damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(lab) -> Path:
    """A run with checkpoints of updates 6 and 7; a test takes a copy."""
    lab.run("teacher", "stopped", signals={"update": 7, "numbers": [signal.SIGTERM]})
    assert [path.name for path in checkpoint.numbered(lab.folder / "stopped")] == [
        f"checkpoint-000000{n}" for n in "67"
    ]
    return lab.folder / "stopped"


def damage(path: Path, how: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content)) if how != "without its end" else len(content) - 1
    if how == "a bit flipped":
        content[place] ^= 1 << rng.randrange(8)
    elif how == "a byte inverted":
        content[place] ^= 0xFF
    else:
        del content[place:]
    path.write_bytes(content)


HOW = ["cut off", "a bit flipped"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "model.json", "manifest.json"])
def test_the_checkpoint_before_a_damaged_one_is_used(lab, stopped, out, file, how):
    rng = random.Random(f"{SEED} {file} {how}")
    for _ in range(KILLS // 2):
        shutil.copytree(stopped, lab.folder / out)
        damage(lab.folder / out / "checkpoint-0000007" / file, how, rng)
        ended = lab.finish("teacher", out)
        assert ended.updates() == [("teacher", 7), ("teacher", 8)]
        (line,) = warnings(ended)
        assert f"{out}/checkpoint-0000007/{file} is " in line and f"using {out}/checkpoint-0000006 instead" in line
        shutil.rmtree(lab.folder / out)


def test_where_every_checkpoint_is_damaged_all_are_named(lab, stopped, out):
    shutil.copytree(stopped, lab.folder / out)
    for number in "67":
        damage(lab.folder / out / f"checkpoint-000000{number}" / "state.json", "cut off", random.Random(0))
    ended = lab.run("teacher", out, "--resume")
    assert_refused(ended, "checkpoint-0000006/state.json", "checkpoint-0000007/state.json", "--overwrite")
    assert lab.run("teacher", out, "--overwrite").code == 0
    lab.assert_exact("teacher", out)


@pytest.mark.parametrize(
    ("how", "lost"), [("cut off", 3), ("a bit flipped", 2), ("a byte inverted", 2), ("without its end", 0)]
)
def test_a_damaged_log_costs_its_damaged_lines(lab, stopped, out, how, lost):
    """lost: the most; damage of a line's end may cost two."""
    lab.whole("teacher")
    rng, expected = random.Random(f"{SEED} {how}"), finals(lab.folder / "teacher")
    every = expected.pop("metrics.jsonl")
    for _ in range(KILLS // 2 * 3):
        shutil.copytree(stopped, lab.folder / out)
        damage(lab.folder / out / "metrics.jsonl", how, rng)
        ended = lab.run("teacher", out, "--resume")
        assert ended.code == 0, ended.err
        found = finals(lab.folder / out)
        rows = found.pop("metrics.jsonl")
        assert found == expected and rows[-1] == every[-1]
        assert sum(row not in rows for row in every) <= lost
        shutil.rmtree(lab.folder / out)


def test_a_damaged_round_is_named_and_can_be_made_again(lab, out):
    lab.run("stage2", out, signals={"update": 9, "numbers": [signal.SIGTERM]})
    path = lab.folder / out / "steps-2" / "model.safetensors"
    damage(path, "a bit flipped", random.Random(SEED))
    assert_refused(lab.run("stage2", out, "--resume"), f"{out}/steps-2/model.safetensors is damaged")
    shutil.rmtree(path.parent)
    lab.finish("stage2", out)


# --- Losses and data -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run_and_the_checkpoint_before_it_serves(lab, out):
    ended = lab.run("teacher", out, not_finite={"since": 5})
    last = ended.err.splitlines()[-1]
    assert ended.code == 2 and last.startswith(f"error: the loss was not finite at update 5 of {out}: lower --lr")
    assert "Traceback" not in ended.err
    assert [path.name for path in checkpoint.numbered(lab.folder / out)] == ["checkpoint-0000003"]
    shutil.copytree(lab.folder / out, lab.folder / "lower")
    assert lab.finish("teacher", out).updates()[0] == ("teacher", 4)
    assert lab.run("teacher", "lower", "--resume", "--lr", "1e-4").code == 0
    first, second = (checkpoint.load(lab.folder / name).state_dict() for name in (out, "lower"))
    assert all(value.isfinite().all() for value in second.values())
    assert any(not torch.equal(value, second[name]) for name, value in first.items())
    shutil.rmtree(lab.folder / "lower")


def test_data_that_vanish_cost_nothing_until_the_run_is_resumed(lab, out):
    images = lab.folder / "images"
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)):
        (images / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(images / "ab"[index % 2] / f"{index}.png")
    line = ["--data", "images"]
    assert lab.run("teacher", "kept", *line).code == 0
    assert lab.run("teacher", out, *line, vanish={"update": 4, "data": "images"}).code == 0
    assert finals(lab.folder / out) == finals(lab.folder / "kept")
    assert not images.exists() and not list((lab.folder / "cache").glob("*.npy"))

    shutil.rmtree(lab.folder / out)
    (lab.folder / "images.gone").rename(images)
    stop = {"update": 5, "numbers": [signal.SIGTERM]}
    assert lab.run("teacher", out, *line, vanish={"update": 4, "data": "images"}, signals=stop).code == 0
    before = snapshot(lab.folder / out)
    assert_refused(lab.run("teacher", out, *line, "--resume"), "there is no data set 'images'")
    assert snapshot(lab.folder / out) == before
    (lab.folder / "images.gone").rename(images)
    assert lab.run("teacher", out, *line, "--resume").code == 0
    assert finals(lab.folder / out) == finals(lab.folder / "kept")


def test_an_extractor_that_was_just_trained_scores_as_one_from_the_cache(tmp_path, monkeypatch):
    """Else the scores of a run whose first process trained it would differ after a resume."""

    def train(network, *_):
        for part in network.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.running_var.uniform_(0.5, 2)
        network.to(memory_format=torch.channels_last)  # as real training does
        return 0.5

    monkeypatch.setattr(metrics, "_train", train)
    images = torch.rand(300, 1, 8, 8) * 2 - 1
    made, read = (metrics.load_extractor("digits", cache=tmp_path).network for _ in range(2))
    for first, second in zip(made(images), read(images), strict=True):
        assert torch.equal(first, second)


if __name__ == "__main__":
    serve()
