"""Scores on the features of a network that is given: what they are, resumed and over processes, and what is refused."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from command_lines import assert_refused, elsewhere, run  # noqa: F401
from common import save_model
from scipy import linalg
from torch import nn

from fastdiff import checkpoint, data, features, score
from fastdiff.generate import Sampling, generate


class Pooled(nn.Module):
    """uint8 (N, 3, H, W) -> (N, 4): means over quarters of the image, of several sizes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.uint8
        return nn.functional.avg_pool2d(x.float() / 255, 4).flatten(1)[:, :4] * torch.arange(1, 5)


class Nvidias(Pooled):
    """Returns classes unless it is asked for features."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        found = nn.functional.avg_pool2d(x.float() / 255, 4).flatten(1)[:, :4] * torch.arange(1, 5)
        return found if return_features else found.softmax(1)


class Wrong(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean()


LINE = ("evaluate", "--checkpoint", "model", "--features", "net.pt", "--steps", 2, "--num", 30, "--device", "cpu")


@pytest.fixture(autouse=True)
def given(elsewhere):  # noqa: F811
    torch.jit.script(Pooled()).save("net.pt")
    torch.jit.script(Wrong()).save("wrong.pt")
    torch.jit.script(Nvidias()).save("nvidias.pt")
    save_model(Path("model"))


def rows():
    return json.loads(Path("results.json").read_text())["rows"]


def reference():
    return json.loads(Path("results.json").read_text())["reference"]


def comparable(row):
    """Of a row, what does not depend on how much of it had been made before."""
    return {key: value for key, value in row.items() if key not in ("images_per_second", "nfe")}


def expected_features() -> tuple[torch.Tensor, torch.Tensor]:
    digits, model = data.load("digits"), checkpoint.load("model")
    labels = torch.from_numpy(digits.labels[np.arange(30) * len(digits) // 30])
    made = torch.cat(list(generate(model, labels, Sampling(steps=2))))
    images = torch.from_numpy(digits.images), data.to_uint8(made)
    return tuple(Pooled()(each.expand(-1, 3, -1, -1)) for each in images)


def test_the_scores_are_those_of_their_definitions(run):  # noqa: F811
    assert run(*LINE, "--fid").code == 0
    (row,), (real, made) = rows(), expected_features()
    x, y = real.double().numpy(), made.double().numpy()
    root = linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    fd = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    assert row["distance"] == pytest.approx(fd, abs=2e-4) and row["nfe"] == 2
    near = [[np.linalg.norm(b - a) for b in x] for a in y]
    radius = [np.sort(np.linalg.norm(x - a, axis=1))[3] for a in x]
    own = [np.sort(np.linalg.norm(y - a, axis=1))[3] for a in y]
    assert row["precision"] == pytest.approx(np.mean([(d <= np.array(radius)).any() for d in near]), abs=1e-4)
    assert row["recall"] == pytest.approx(np.mean((np.array(near) <= np.array(own)[:, None]).any(0)), abs=1e-4)
    assert run(*LINE, "--features", "nvidias.pt", "--overwrite").code == 0 and rows()[0]["distance"] == row["distance"]
    assert run(*LINE, "--fid", "--overwrite").code == 0
    said = json.loads(Path("results.json").read_text())["reference"]
    assert said["distance"] == "FID" and "net.pt" in said["features"] and "1438 images" in said["real"]


def test_kid_is_the_unbiased_squared_distance_of_kernels():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 5, generator=generator), 0.5 + torch.randn(40, 5, generator=generator)
    k = lambda a, b: (float(a @ b) / 5 + 1) ** 3  # noqa: E731
    within = [sum(k(z[i], z[j]) for i in range(40) for j in range(40) if i != j) / (40 * 39) for z in (x, y)]
    across = sum(k(a, b) for a in x for b in y) / 1600
    assert features.kid(x, y) == pytest.approx(sum(within) - 2 * across, rel=1e-4)
    assert abs(features.kid(x.repeat(50, 1), x.repeat(50, 1))) < 0.05


def test_a_reference_of_moments_does_as_well(run):  # noqa: F811
    real = expected_features()[0].double().numpy()
    np.savez("refs.npz", mu=real.mean(0), sigma=np.cov(real.T))
    assert run(*LINE, "--guidance", 0, 1).code == 0
    by_data = [row["distance"] for row in rows()]
    assert run(*LINE, "--guidance", 0, 1, "--reference", "refs.npz", "--overwrite").code == 0
    assert len(by_data) == 2 and by_data[0] != by_data[1] and "kid" not in rows()[0]
    assert json.loads(Path("results.json").read_text())["reference"]["distance"] == "distance"


def test_a_known_network_makes_it_fid(run, monkeypatch):  # noqa: F811
    assert run(*LINE).code == 0 and reference()["distance"] == "distance"
    monkeypatch.setitem(features.FIDS, hashlib.sha256(Path("net.pt").read_bytes()).hexdigest(), "this one")
    result = run(*LINE, "--overwrite")
    assert reference()["distance"] == "FID" and "| FID |" in result.out


def test_the_inception_of_torch_fidelity(run, monkeypatch):  # noqa: F811
    """Its features come in a tuple, one tensor a name that was asked for."""

    class Its(Pooled):
        def forward(self, x):
            return (super().forward(x),)

    def create_feature_extractor(name, list_features, cuda=True, **_):
        assert name == "inception-v3-compat" and list_features == ["2048"] and not cuda
        return Its()

    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    its = (*LINE, "--features", "torch-fidelity")
    assert_refused(run(*its), "torch-fidelity", "not installed")
    library, utils = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.utils")
    library.__version__, utils.create_feature_extractor = "0.4.0", create_feature_extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", library)
    monkeypatch.setitem(sys.modules, "torch_fidelity.utils", utils)
    assert run(*its).code == 0
    assert reference()["distance"] == "FID" and "torch-fidelity 0.4.0" in reference()["features"]
    found = rows()[0]["distance"]
    assert run(*LINE, "--overwrite").code == 0 and rows()[0]["distance"] == found
    utils.create_feature_extractor = lambda *_, **__: 1 / 0
    assert_refused(run(*its, "--overwrite"), "torch-fidelity", "division by zero")


def test_what_was_made_is_not_made_again(run, monkeypatch):  # noqa: F811
    monkeypatch.setattr(score, "PASS", 8)
    both = (*LINE, "--guidance", 0, 1)
    assert run(*both).code == 0
    whole, real, calls = rows(), score._features, []

    def killed(model, labels, ids, sampling, *rest):
        calls.append((sampling.guidance, int(ids[0])))
        if calls[-1] == (1, 16) and calls.count((1, 16)) == 1:
            raise KeyboardInterrupt
        return real(model, labels, ids, sampling, *rest)

    monkeypatch.setattr(score, "_features", killed)
    Path("results.json").unlink()
    assert run(*both).code == 130 and len([*Path().glob(".results.json.*")]) == 6
    assert [comparable(row) for row in rows()] == [comparable(whole[0])]  # a row is there as soon as it is made
    before = rows()
    for other in (["--seed", 1], ["--guidance", 1], ["--num", 29]):  # another command would lose them
        assert_refused(run(*both, *other), "results.json", "already exists")
    assert rows() == before
    assert run(*both).code == 0
    assert calls == [(0, n) for n in (0, 8, 16, 24)] + [(1, n) for n in (0, 8, 16, 16, 24)]
    assert [comparable(row) for row in rows()] == [comparable(row) for row in whole]
    assert not [*Path().glob(".results.json.*")]
    assert_refused(run(*both), "results.json", "already exists")


def test_other_images_are_not_taken_for_these(run, monkeypatch):  # noqa: F811
    real, calls = score._features, []

    def counted(model, labels, ids, *rest):
        calls.append(len(ids))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(model, labels, ids, *rest)

    monkeypatch.setattr(score, "PASS", 20)
    monkeypatch.setattr(score, "_features", counted)
    assert run(*LINE).code == 130
    assert run(*LINE, "--seed", 1).code == 0 and calls == [20, 10, 20, 10]


def test_processes_share_the_work(run):  # noqa: F811
    assert run(*LINE).code == 0
    alone = rows()[0]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "--"]
    line = ["fastdiff.evaluate", *map(str, LINE[1:]), "--overwrite"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*command, *line], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in ("distance", "kid", "precision", "recall", "nfe"):
        assert rows()[0][name] == pytest.approx(alone[name], abs=2e-3), name


def test_what_is_refused(run):  # noqa: F811
    np.savez("narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez("other.npz", mean=np.zeros(4))
    np.savez("odd.npz", mu=np.zeros(4), sigma=np.eye(3))
    Path("none.pt").write_bytes(b"no network")
    for more, parts in (
        (("--reference", "narrow.npz"), ("3 features", "4", "narrow.npz")),
        (("--reference", "other.npz"), ("other.npz", "mu")),
        (("--reference", "odd.npz"), ("odd.npz", "(3, 3)")),
        (("--reference", "nowhere.npz"), ("nowhere.npz",)),
        (("--features", "none.pt"), ("none.pt", "TorchScript")),
        (("--features", "nowhere.pt"), ("nowhere.pt",)),
        (("--features", "wrong.pt"), ("wrong.pt", "(N, D)")),
    ):
        assert_refused(run(*LINE, *more), *parts)
    assert_refused(run("evaluate", "--checkpoint", "model", "--device", "cpu", "--fid"), "--features")
    assert not Path("results.json").exists()
