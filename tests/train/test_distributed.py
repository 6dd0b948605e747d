"""One, two and four processes on one machine: the same losses, weights and samples, and checkpoints that fit all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
COMMON = ["--batch-size", "16", "--device", "cpu", "--log-every", "1", "--anneal", "none"]
TINY = ["--unet.channels", "8", "--unet.channel-mult", "1", "--unet.blocks", "1", "--unet.no-middle-attention"]
ROUNDS = ["--start-steps", "4", "--end-steps", "1", "--updates", "2", "--last-updates", "2"]


def launch(processes: int, *arguments) -> None:
    module = ["-m"] if not str(arguments[0]).endswith(".py") else []
    command = [sys.executable, *module] if processes == 1 else [*LAUNCH, str(processes), *module, "--"]
    done = subprocess.run(
        [*command, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_alike(run: Path, other: Path) -> None:
    """The same losses and final weights, within rounding."""
    assert losses(run) == pytest.approx(losses(other), rel=1e-5)
    files = [sorted(folder.glob("*/model.safetensors"))[-1] for folder in (run, other)]
    first, second = (load_file(path) for path in files)
    assert first.keys() == second.keys() and files[0].parent.name == files[1].parent.name
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Six updates of a teacher by one process, its checkpoints at 3 and 6."""
    out = tmp_path_factory.mktemp("alone") / "run"
    launch(1, "train.teacher", *COMMON, *TINY, "--out", out, "--updates", 6, "--save-every", 3)
    return out


@pytest.fixture(scope="module")
def student(alone) -> Path:
    """Two updates of stage 1."""
    out = alone.parent / "stage1"
    launch(1, "train.stage1", *COMMON, "--teacher", alone, "--out", out, "--updates", 2)
    return out


def test_four_processes_begin_and_two_go_on(alone, tmp_path):
    teacher = ["train.teacher", *COMMON, *TINY, "--out", tmp_path / "run", "--save-every", 3, "--accumulate", 2]
    launch(4, *teacher, "--updates", 3)
    assert losses(tmp_path / "run") == pytest.approx(losses(alone)[:3], rel=1e-5)
    launch(2, *teacher, "--updates", 6, "--resume")
    assert_alike(tmp_path / "run", alone)


@pytest.mark.parametrize(
    ("recipe", "ways"),
    [
        (["train.stage1", "--updates", "3"], ("copies", "sharded")),
        (["train.stage2", *ROUNDS], ("copies", "sharded")),
        (["train.encoder", *ROUNDS], ("copies",)),  # shards as stage 2 does
        (["train.two_student", *ROUNDS], ("sharded",)),
        (["train.sid", "--updates", "3", "--score-num", "20", "--data", "digits"], ("copies", "sharded")),
    ],
    ids=lambda value: value[0] if value[0].startswith("train") else "",
)
def test_two_processes_distil_as_one_does(alone, student, tmp_path, recipe, ways):
    """As copies of each network, and with every network split over both."""
    of = student if recipe[0] in ("train.stage2", "train.encoder", "train.sid") else alone
    for name in ("one", *ways):
        shard = ("--shard", "--shard-teacher") if name == "sharded" else ()
        out = "--out", tmp_path / name
        launch(1 if name == "one" else 2, *recipe, *COMMON, *shard, "--ema", 0.5, "--teacher", of, *out)
    for name in ways:
        assert_alike(tmp_path / name, tmp_path / "one")
    if recipe[0] == "train.sid":
        fds = [json.loads((tmp_path / name / "scores.jsonl").read_text())["fd"] for name in ("one", *ways)]
        assert fds == pytest.approx([fds[0]] * 3, rel=1e-2)


def test_sharded_processes_begin_and_others_go_on(alone, tmp_path):
    """One checkpoint, whether it was written by processes that share a network, have a copy each, or by one."""
    teacher = ["train.teacher", *COMMON, *TINY, "--out", tmp_path / "run", "--save-every", 3]
    launch(4, *teacher, "--updates", 3, "--shard", "--accumulate", 2)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    launch(1, *teacher, "--updates", 6, "--resume", "--accumulate", 2)
    launch(2, *teacher, "--updates", 6, "--resume", "--accumulate", 2, "--shard", "--out", tmp_path / "copy")
    for name in ("run", "copy"):
        assert_alike(tmp_path / name, alone)


SHARES = """
import torch
from fastdiff import distributed
from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.losses.batch import Batch
from fastdiff.unet import UNetConfig
from train.options import LoopOptions
from train.updater import new_updater


def main():
    torch.manual_seed(distributed.rank())
    loss = lambda model, batch: model(batch.x, torch.ones(2)).square().mean((1, 2, 3))
    denoiser = Denoiser(DenoiserConfig(UNetConfig(image_channels=1, image_size=(8, 8), channels=16, head_width=None)))
    total = sum(p.numel() for p in denoiser.parameters())
    options = LoopOptions(out=None, device="cpu", shard=True, ema=0.9, batch_size=4)
    updater = new_updater(options, denoiser, loss)
    for _ in range(2):
        updater.update(Batch(torch.ones(2, 1, 8, 8), None, torch.arange(2), 0))
        held = {
            "weights": list(denoiser.parameters()),
            "average": list(updater.averaged.parameters()),
            "moments": [t for p in denoiser.parameters() for t in updater.optimizer.state[p].values() if t.ndim],
        }
        for name, tensors in held.items():
            here = sum(distributed.local(t).numel() for t in tensors)
            assert here < 0.52 * total * (2 if name == "moments" else 1), (name, here, total)
        with torch.no_grad():
            updater.averaged(torch.ones(1, 1, 8, 8), torch.ones(1))
    whole = updater.model()
    assert sum(p.numel() for p in whole.parameters()) == total
    sums = torch.stack([p.detach().double().sum() for p in whole.parameters()])
    assert torch.equal(distributed.total(sums), 2 * sums)


distributed.start()
main()
distributed.stop()
"""


def test_each_of_two_processes_holds_half(tmp_path):
    (tmp_path / "shares.py").write_text(SHARES)
    launch(2, tmp_path / "shares.py")


def test_one_process_has_nothing_to_split_over(tmp_path):
    command = [sys.executable, "-m", "train.teacher", *COMMON, *TINY, "--out", tmp_path / "run", "--shard"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "--shard splits networks over several processes, and this is one" in done.stderr
    assert not (tmp_path / "run").exists()


def test_two_processes_make_the_same_pictures(alone, tmp_path):
    pictures = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        sampling = ["--num", 7, "--batch-size", 4, "--steps", 3, "--guidance", 1, "--device", "cpu"]
        launch(processes, "fastdiff.sample", "--checkpoint", alone, *sampling, "--out", out)
        pictures.append([np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("*.png"))])
    assert len(pictures[0]) == len(pictures[1]) == 7
    for first, second in zip(*pictures, strict=True):
        assert np.abs(first - second).max() <= 1


def test_a_process_that_dies_ends_the_others_and_is_named(alone, tmp_path):
    arguments = ["train.teacher", *COMMON, *TINY, "--out", tmp_path / "run", "--updates", 10**6]
    process = subprocess.Popen(
        [*LAUNCH, "2", "-m", *map(str, arguments)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    log, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
    while not log.exists() and time.monotonic() < end:
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    (victim,) = [int(pid) for pid, variables in ranks.items() if b"RANK=1" in variables]
    os.kill(victim, signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode != 0 and "rank      : 1" in told
    assert all(not Path(f"/proc/{pid}").exists() for pid in children)


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    command = [*LAUNCH, "2", "-m", "train.teacher", *TINY, "--out", str(tmp_path / "run"), "--batch-size", "15"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.stderr.count("error: --batch-size 15 does not divide into 2 equal parts") == 1
    assert not (tmp_path / "run").exists()
