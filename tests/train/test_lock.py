"""One job at a time in a run's folder: the second is told who is there, and a dead one keeps nobody out."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import command_lines
import pytest
from command_lines import assert_refused
from common import snapshot

from fastdiff import lock
from fastdiff.errors import UserError
from train import compare, demo

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")

TEACHER = "--unet.channels 8 --unet.channel-mult 1 --unet.blocks 1 --unet.no-middle-attention --updates 2 --device cpu"
HOLDER = """
import sys, time
from pathlib import Path
from fastdiff import lock
with lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of the folder "out"."""
    (tmp_path / "out").mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLDER, tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("how", [[], ["--resume"], ["--overwrite"]])
def test_a_second_process_is_refused_and_a_dead_one_keeps_nobody_out(run, holder, how):
    """A job that was requeued while it still ran once trained along and removed the other's checkpoints."""
    before = snapshot("out")
    train = ["teacher", *TEACHER.split(), "--out", "out", *how]
    assert_refused(run(*train), f"out is in use by process {holder.pid} on {socket.gethostname()}", "another --out")
    assert snapshot("out") == before
    holder.kill()
    holder.wait()
    assert Path("out/.lock").exists()
    result = run(*train)
    assert result.code == 0 and not Path("out/.lock").exists(), result.err


def test_to_look_needs_no_lock(run, runs):
    with lock.held(runs.teacher):
        assert run("status", runs.teacher).code == 0
        assert run("plot", runs.teacher, "--out", "curves.png").code == 0
        given = ["--checkpoint", runs.teacher, "--num", 1, "--steps", 1, "--device", "cpu", "--out", "grid.png"]
        assert run("sample", *given).code == 0


@pytest.mark.parametrize("module", [compare, demo])
def test_several_runs_in_one_folder_are_one_job(module, tmp_path):
    with lock.held(tmp_path), pytest.raises(UserError, match=f"{tmp_path} is in use by process {os.getpid()}"):
        module.main(module.Options(out=tmp_path, device="cpu"))


def test_what_a_run_refuses_is_not_touched(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    assert_refused(run("teacher", *TEACHER.split(), "--out", "mine"), "mine is not empty and holds no run")
    assert os.listdir("mine") == ["notes.txt"]


def test_where_there_are_no_locks_it_is_said_once(monkeypatch, tmp_path, capsys):
    def refuse(descriptor, operation):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    for _ in range(2):
        with lock.held(tmp_path):
            pass
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"the file system of {tmp_path} has no locks" in told


def test_a_lock_whose_file_was_removed_in_between_is_taken_anew(monkeypatch, tmp_path):
    """Who opened the file just before its holder removed it would hold a file that nobody else finds."""
    real, removed = lock.fcntl.flock, []

    def flock(descriptor, operation):
        if not removed:
            removed.append((tmp_path / ".lock").unlink())
        real(descriptor, operation)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with lock.held(tmp_path), pytest.raises(UserError, match="in use"), lock.held(tmp_path):
        pass
    assert removed and not (tmp_path / ".lock").exists()
