"""A network that is not the project's goes through every recipe, as the guide shows it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import command_lines
import numpy as np
import pytest
import torch
from command_lines import assert_refused

from fastdiff import checkpoint, denoiser
from fastdiff.denoiser import Denoiser, DenoiserConfig, with_guidance
from fastdiff.errors import UserError
from fastdiff.generate import Sampling, generate
from fastdiff.unet import UNetConfig
from train import begin, encoder, sid, stage1, stage2, two_student

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
SMALL = {"updates": 2, "batch_size": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def readme():
    """The examples in Python of the README and of the guide to networks of one's own."""
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text() + (root / "docs/guide/own-network.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def made(readme, tmp_path_factory):
    (example,) = (code for code in readme if "NETWORKS" in code)
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(denoiser, "NETWORKS", dict(denoiser.NETWORKS))
        patch.setattr("train.options.LoopOptions.device", "cpu")
        names = {}
        exec(example, names)
        yield folder, names["Mine"]


def test_the_readme_names_what_there_is(readme):
    assert len(readme) == 2


def test_every_recipe_takes_it(made):
    folder, mine = made
    first, student = folder / "runs/mine-stage1", folder / "runs/mine-stage2/steps-1"
    teacher = checkpoint.load(folder / "runs/mine")
    assert isinstance(teacher.network, mine) and not hasattr(teacher.network, "guidance")
    assert isinstance(with_guidance(teacher), denoiser.Guided)
    loaded = checkpoint.load(student)
    assert isinstance(loaded.network, mine) and loaded.network.guidance.weight.abs().max() > 0
    images = next(generate(loaded, 3, Sampling(guidance=1.0)))
    assert images.shape == (3, 1, 8, 8) and images.isfinite().all() and images.std() > 0.1
    half = {"start_steps": 2, **SMALL}
    stage2.train(stage2.Options(teacher=first, out=folder / "dry", dry_run=True, **half))
    sid.train(sid.Options(teacher=first, out=folder / "dry", dry_run=True, data=None, **SMALL))
    assert not (folder / "dry").exists()
    encoder.train(encoder.Options(teacher=first, out=folder / "encoder", **half))
    two_student.train(two_student.Options(teacher=folder / "runs/mine", out=folder / "two", guidance=1.0, **half))
    stage2.train(stage2.Options(teacher=first, out=folder / "stochastic", sampler="stochastic", **half))
    sid.train(sid.Options(teacher=first, out=folder / "sid", score_num=8, **SMALL))
    for name in ("encoder/steps-1", "two/steps-1", "stochastic/steps-1", "sid"):
        assert isinstance(checkpoint.load(folder / name).network, mine)


def test_a_new_student_starts_as_the_teacher(made):
    from train.stage1 import student_of

    teacher = checkpoint.load(made[0] / "runs/mine")
    z, angle, label = torch.randn(4, 1, 8, 8), torch.rand(4) + 0.2, torch.arange(4)
    with torch.no_grad():
        found = student_of(teacher, (0.0, 4.0))(z, angle, label, torch.full((4,), 3.0))
        torch.testing.assert_close(found, teacher(z, angle, label))


def test_a_network_that_nothing_builds_is_refused(made, run, monkeypatch):
    """Loading a file never imports anything, so a checkpoint cannot bring its own code."""
    monkeypatch.setattr(denoiser, "NETWORKS", {"unet": denoiser.UNet})
    assert json.loads((made[0] / "runs/mine/model.json").read_text())["network"] == "mine"
    result = run("sample", "--checkpoint", made[0] / "runs/mine", "--device", "cpu", "--out", "grid.png")
    assert_refused(result, "model.json", "'mine'", "fastdiff.denoiser.NETWORKS")


# --- what networks of other people have, and fastdiff's does not ---


class Odd(torch.nn.Module):
    """A buffer that is not saved, a plain tensor, tied weights, a frozen and an unused parameter."""

    def __init__(self, config):
        super().__init__()
        self.register_buffer("window", torch.hann_window(8), persistent=False)
        self.frequencies = torch.from_numpy(np.arange(1.0, 5.0, dtype=np.float32))
        self.label = torch.nn.Embedding(config.num_classes + 1, 4).requires_grad_(False)
        self.first, self.second = (torch.nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.second.weight = self.first.weight
        self.into, self.out = torch.nn.Conv2d(1, 8, 1), torch.nn.Conv2d(8, 1, 1)
        self.unused = torch.nn.Linear(3, 3)

    def forward(self, z, time, label, guidance):
        embedding = torch.cat([self.label(label), torch.sin(time[:, None] * self.frequencies)], 1)
        h = self.into(z * self.window) + embedding[..., None, None]
        return self.out(self.second(torch.tanh(self.first(h))))


@pytest.fixture
def odd(monkeypatch, tmp_path):
    monkeypatch.setattr(denoiser, "NETWORKS", denoiser.NETWORKS | {"odd": Odd})
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    teacher = Denoiser(DenoiserConfig(UNetConfig((8, 8), 1, 10), parameterization="eps", network="odd"))
    checkpoint.save("teacher", teacher)
    return teacher


def test_an_odd_network_is_saved_and_loaded(odd):
    loaded = checkpoint.load("teacher")
    z, angle, label = torch.randn(4, 1, 8, 8), torch.rand(4) + 0.2, torch.arange(4)
    with torch.no_grad():
        torch.testing.assert_close(loaded(z, angle, label), odd(z, angle, label))
    network = loaded.network
    assert network.first.weight is network.second.weight
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == {"label.weight"}


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_an_odd_network_trains_and_goes_on(odd, ema, capsys):
    given = {"ema": ema, "guidance_range": (1.0, 1.0), "log_every": 1, "weight_decay": 0.1, **SMALL}
    options = stage1.Options(teacher="teacher", out="stage1", **given)
    stage1.train(replace(options, dry_run=True))
    memory = float(re.search(r"activations ([\d.e-]+)", capsys.readouterr().out)[1])
    assert memory * 2**30 == pytest.approx(begin._saved_bytes(denoiser.blank(odd.config), 8), rel=1e-2)
    stage1.train(options)
    stage1.train(replace(options, updates=4, resume=True))
    whole = stage1.train(replace(options, updates=4, out=Path("whole"), anneal="none", lr=1e-3)).network
    halves = stage1.train(replace(options, updates=2, out=Path("halves"), anneal="none", lr=1e-3))
    halves = stage1.train(replace(options, updates=4, out=Path("halves"), anneal="none", lr=1e-3, resume=True)).network
    for (name, one), other in zip(whole.state_dict().items(), halves.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    start = odd.network
    assert torch.equal(whole.label.weight, start.label.weight), "what the network froze was trained"
    assert not torch.equal(whole.first.weight, start.first.weight)
    assert torch.equal(whole.first.weight, whole.second.weight) and torch.equal(
        whole.unused.weight, start.unused.weight
    )
    assert torch.equal(checkpoint.load("halves").network.second.weight, whole.second.weight)


def test_an_odd_network_goes_through_every_other_recipe(odd):
    stage1.train(stage1.Options(teacher="teacher", out="stage1", guidance_range=(1.0, 1.0), **SMALL))
    stage2.train(stage2.Options(teacher="stage1", out="stage2", start_steps=4, **SMALL))
    two_student.train(two_student.Options(teacher="teacher", out="two", start_steps=2, precision="auto", **SMALL))
    sid.train(sid.Options(teacher="stage1", out="sid", score_num=8, data=None, **SMALL))
    for name in ("stage1", "stage2/steps-1", "two/steps-1", "sid"):
        network = checkpoint.load(name).network
        assert torch.equal(network.label.weight, odd.network.label.weight), name
        assert torch.equal(network.first.weight, network.second.weight), name


def test_a_tensor_that_does_not_follow_the_network_is_named(odd):
    with pytest.raises(UserError, match=r"'odd' keeps its tensor frequencies .* register_buffer"):
        checkpoint.load("teacher", device="meta")


@pytest.mark.parametrize("make", ["plain", "buffer", "list"])
def test_a_tensor_that_no_checkpoint_brings_back_is_named(odd, monkeypatch, make):
    class Drawing(Odd):
        def __init__(self, config):
            super().__init__(config)
            if make == "buffer":
                self.register_buffer("drawn", torch.randn(4), persistent=False)
            else:
                self.drawn = torch.randn(4) if make == "plain" else {"a": [torch.randn(4)]}

    monkeypatch.setitem(denoiser.NETWORKS, "odd", Drawing)
    name = "drawn" if make != "list" else r"drawn\['a'\]\[0\]"
    with pytest.raises(UserError, match=f"its tensor {name} anew each time"):
        checkpoint.load("teacher")


def test_a_network_that_is_frozen_as_a_whole_is_refused(odd, monkeypatch):
    monkeypatch.setitem(denoiser.NETWORKS, "odd", lambda config: Odd(config).requires_grad_(False))
    with pytest.raises(UserError, match="'odd' has nothing to learn"):
        stage1.train(stage1.Options(teacher="teacher", out="stage1", guidance_range=(1.0, 1.0), **SMALL))


class Forgetful(Odd):
    """Drops labels itself, beside ordinary dropout."""

    rate = 0.1

    def forward(self, z, time, label, guidance):
        if self.training:
            label = torch.where(torch.rand(len(label)) < self.rate, self.label.num_embeddings - 1, label)
        return torch.nn.functional.dropout(super().forward(z, time, label, guidance), 0.3, self.training)


@pytest.mark.parametrize("rate", [0.1, 0.0])
def test_a_network_that_drops_labels_itself_is_told_of(odd, monkeypatch, capsys, rate):
    monkeypatch.setitem(denoiser.NETWORKS, "odd", Forgetful)
    monkeypatch.setattr(Forgetful, "rate", rate)
    stage1.train(stage1.Options(teacher="teacher", out="student", dry_run=True, **SMALL))
    assert ("'odd' drops labels itself" in capsys.readouterr().err) == (rate > 0)


class Normalized(Odd):
    """With batch normalization, whose statistics are buffers."""

    def __init__(self, config):
        super().__init__(config)
        self.norm = torch.nn.BatchNorm2d(1)

    def forward(self, z, time, label, guidance):
        return self.norm(super().forward(z, time, label, guidance) + 3)


def test_statistics_of_batch_normalization_are_those_of_the_run(odd, monkeypatch):
    """They were once saved as the teacher had them, beside the averaged weights of the student."""
    monkeypatch.setitem(denoiser.NETWORKS, "odd", Normalized)
    checkpoint.save("teacher", Denoiser(odd.config))
    options = stage1.Options(teacher="teacher", out="run", guidance_range=(1.0, 1.0), ema=0.9, save_every=3, **SMALL)
    found = stage1.train(replace(options, updates=6)).network.norm
    (newest,) = Path("run").glob("checkpoint-0000006")
    _, tensors = checkpoint.load_state(newest)
    for name, kept in checkpoint.load(newest).network.norm.named_buffers():
        assert torch.equal(kept, tensors[f"weights/norm.{name}"]) and torch.equal(kept, found.get_buffer(name)), name
    assert found.num_batches_tracked == 6 and found.running_mean > 1  # of 3, with momentum 0.1
    assert not torch.equal(found.weight, tensors["weights/norm.weight"])
    stopped = replace(options, out=Path("halves"))
    stage1.train(replace(stopped, updates=3, anneal="none"))
    halves = stage1.train(replace(stopped, updates=6, anneal="none", resume=True))
    whole = stage1.train(replace(stopped, updates=6, anneal="none", out=Path("whole")))
    assert halves.weights_sha256() == whole.weights_sha256()
