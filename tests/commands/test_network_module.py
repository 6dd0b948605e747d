"""--network-module: a network of the user's own for every command, run only where the option names its file."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_lines import assert_refused, elsewhere, run  # noqa: F401
from common import save_model

from fastdiff import checkpoint, denoiser, networks
from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.unet import UNetConfig
from train.stage1 import student_of

FILE = """
import torch
from torch import nn
from beside import WIDTH
from fastdiff.denoiser import NETWORKS


class Odd(nn.Module):
    '''With an unsaved buffer, tied and frozen weights, and nothing that the meta device could build.'''

    def __init__(self, config):
        super().__init__()
        self.register_buffer("ramp", torch.arange(8.0) / sum(range(8)), persistent=False)
        self.label = nn.Embedding(config.num_classes + 1, WIDTH)
        self.frozen = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.first = nn.Conv2d(config.image_channels + WIDTH, WIDTH, 3, padding=1)
        self.tied = nn.Conv2d(config.image_channels + WIDTH, WIDTH, 3, padding=1)
        self.tied.weight = self.first.weight
        self.last = nn.Conv2d(WIDTH, config.image_channels, 1)
        if float(self.frozen[0]) != 1:
            raise ValueError("not reached, and refused on the meta device")
        if config.guidance_input:
            self.guidance = nn.Linear(1, WIDTH)
            nn.init.zeros_(self.guidance.weight), nn.init.zeros_(self.guidance.bias)

    def forward(self, z, time, label, guidance):
        embedding = self.label(label) * self.frozen * (1 + time[:, None])
        if hasattr(self, "guidance"):
            embedding = embedding + self.guidance((torch.zeros_like(time) if guidance is None else guidance)[:, None])
        h = torch.cat([z + self.ramp, embedding[:, :, None, None].expand(-1, -1, *z.shape[2:])], 1)
        return self.last(torch.tanh(self.first(h) + self.tied(h)))


NETWORKS["odd"] = Odd
"""
FEW = ("--updates", 2, "--batch-size", 8, "--save-every", 1, "--device", "cpu")
ROUNDS = (*FEW, "--start-steps", 2, "--last-updates", 2)
MODULE = ("--network-module", "mine/odd.py")


@pytest.fixture(autouse=True)
def mine(tmp_path, elsewhere, monkeypatch):  # noqa: F811
    monkeypatch.setattr(denoiser, "NETWORKS", dict(denoiser.NETWORKS))
    monkeypatch.setattr(networks, "_entered", set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "odd.py").write_text(FILE)
    (folder / "beside.py").write_text("WIDTH = 8\n")
    return folder / "odd.py"


def forget():
    """As a process that has not run the file."""
    denoiser.NETWORKS.pop("odd", None)
    networks._entered.clear()


def test_every_command_takes_it(run):  # noqa: F811
    def step(*arguments):
        forget()
        result = run(*arguments, *MODULE)
        assert result.code == 0, result
        return result

    step("teacher", *FEW, "--network", "odd", "--out", "teacher", "--dry-run")
    step("teacher", *FEW, "--network", "odd", "--out", "teacher", "--ema", 0.9)
    step("stage1", *FEW, "--teacher", "teacher", "--out", "stage1")
    step("stage2", *ROUNDS, "--teacher", "stage1", "--out", "stage2")
    step("encoder", *ROUNDS, "--teacher", "stage1", "--out", "encoder")
    step("two_student", *ROUNDS, "--teacher", "teacher", "--out", "two")
    step("sid", *FEW, "--teacher", "stage1", "--data", "None", "--score-num", 16, "--out", "sid")
    step("sample", "--checkpoint", "stage2/steps-1", "--num", 4, "--guidance", 1, "--device", "cpu", "--out", "out")
    models = ("--encoder", "encoder/steps-1", "--decoder", "stage2/steps-1", "--images", "out", "--device", "cpu")
    step("translate", *models, "--from-label", 0, "--to-label", 1)
    first, last = checkpoint.load("teacher").network, checkpoint.load("sid").network
    assert first.first.weight is first.tied.weight and torch.equal(first.ramp, torch.arange(8.0) / 28)
    assert torch.equal(last.frozen, torch.ones(8)) and not last.frozen.requires_grad
    assert not torch.equal(first.first.weight, last.first.weight) and last.guidance.weight.abs().max() > 0


def test_evaluate_and_compare_run_it_too(run):  # noqa: F811
    save_model(Path("teacher"))
    Path("bad.py").write_text("1 / 0")
    for line in (("evaluate", "--checkpoint", "teacher"), ("compare", "--out", "o")):
        assert_refused(run(*line, "--device", "cpu", "--network-module", "bad.py"), "bad.py", "ZeroDivisionError")


def test_it_is_asked_for_again_and_never_run_by_itself(run, mine):  # noqa: F811
    assert run("teacher", *FEW, "--network", "odd", *MODULE, "--out", "teacher").code == 0
    forget()
    again = ("teacher", *FEW, "--network", "odd", "--out", "teacher", "--resume", "--updates", 3)
    assert_refused(run(*again), "--network", "'odd'")
    assert json.loads(Path("teacher/config.json").read_text())["options"]["network_module"] == "mine/odd.py"
    draw = ("sample", "--checkpoint", "teacher", "--num", 2, "--steps", 2, "--device", "cpu")
    assert_refused(run(*draw), "model.json", "'odd'", "--network-module, which was 'mine/odd.py' there")
    assert_refused(run("stage1", *FEW, "--teacher", "teacher", "--out", "o"), "--network-module")
    status = run("status", "teacher")
    assert status.code == 0 and "finished" in status.out
    assert "odd" not in denoiser.NETWORKS
    mine.rename(mine.with_name("moved.py"))
    assert run(*again, "--network-module", "mine/moved.py").code == 0
    assert "--network-module mine/moved.py" in shlex.join(
        json.loads(Path("teacher/config.json").read_text())["command"]
    )


def test_several_processes_take_it(mine):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "--"]
    line = ["train.teacher", *map(str, FEW), "--network", "odd", *MODULE, "--out", "teacher", "--shard"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*command, *line], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    networks.enter(mine)
    network = checkpoint.load("teacher").network
    assert all(p.isfinite().all() for p in network.parameters()) and torch.equal(network.frozen, torch.ones(8))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ("no such file",)),
        ("x = 1\nimport nothing_of_this_name\n", ("line 2", "ModuleNotFoundError", "nothing_of_this_name")),
        ("def f(:\n", ("line 1", "SyntaxError")),
        ("import sys\nsys.exit(3)\n", ("line 2", "SystemExit")),
        ("x = 1\n", ("enters no network", "NETWORKS[")),
        ("from fastdiff.denoiser import NETWORKS\nNETWORKS['unet'] = print\n", ("replaces the network 'unet'",)),
    ],
    ids=["no file", "import error", "syntax error", "exit", "nothing", "ours"],
)
def test_files_that_are_refused(run, text, parts):  # noqa: F811
    if text is not None:
        Path("bad.py").write_text(text)
    before = dict(denoiser.NETWORKS)
    result = run("teacher", *FEW, "--network-module", "bad.py", "--out", "teacher")
    assert_refused(result, "--network-module bad.py", *parts)
    assert before == denoiser.NETWORKS and not Path("teacher").exists()


def test_a_student_of_it_starts_as_it(mine):
    networks.enter(mine)
    torch.manual_seed(0)
    teacher = Denoiser(DenoiserConfig(UNetConfig((8, 8), 1, 10), network="odd"))
    checkpoint.save("teacher", teacher)  # of tied weights
    z, angle, label = torch.randn(4, 1, 8, 8), torch.rand(4) + 0.2, torch.arange(4)
    with torch.no_grad():
        found = student_of(checkpoint.load("teacher"), (0.0, 4.0))(z, angle, label, torch.full((4,), 3.0))
        torch.testing.assert_close(found, teacher(z, angle, label))
