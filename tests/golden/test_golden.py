"""The same seeds give the same weights and pictures as they did when golden.json was recorded; old runs go on.

Exactly (SHA-256) with the processor and the PyTorch of the recording; elsewhere the numbers beside the hashes, as close
as other roundings leave them after six updates: weights within 2e-3 of their tensor's size, losses within 1 %, pictures
within 8 of 255 at 19 pixels of 20 (a rounded label draw or a clipped pixel may differ more).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import record

HERE = Path(__file__).parent
RECORDED = json.loads((HERE / "golden.json").read_text())
HOW = "exact" if RECORDED["where"] == record.where() else "close"
COMPARED = {"exact": "exactly, by hashes", "close": "within tolerances, as processor or PyTorch is another one"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict:
    """Everything once more, in a process of its own."""
    file = tmp_path_factory.mktemp("golden") / "made.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    subprocess.run([sys.executable, HERE / "record.py", file], env=environment, check=True)
    return json.loads(file.read_text())


def assert_weights(found: dict, expected: dict) -> None:
    if HOW == "exact":
        assert found["sha256"] == expected["sha256"]
    assert found["numbers"].keys() == expected["numbers"].keys()
    for name, (norm, *some) in expected["numbers"].items():
        assert np.allclose(found["numbers"][name], [norm, *some], rtol=2e-3, atol=2e-3 * max(norm, 1e-3)), name


def assert_picture(found: dict, expected: dict) -> None:
    if HOW == "exact":
        assert found["sha256"] == expected["sha256"]
    assert found["size"] == expected["size"]
    apart = np.abs(np.array(found["numbers"]) - np.array(expected["numbers"]))
    assert np.quantile(apart, 0.95) <= 8


def test_how_it_is_compared(capsys):
    with capsys.disabled():
        print(f"\ngolden results are compared {COMPARED[HOW]}")
    assert RECORDED["weights"].keys() == set(record.MODELS) and len(RECORDED["grids"]) == len(record.GRIDS) + 1


@pytest.mark.parametrize("name", RECORDED["weights"])
def test_weights(made, name):
    assert_weights(made["weights"][name], RECORDED["weights"][name])


@pytest.mark.parametrize("name", RECORDED["logs"])
def test_logs(made, name):
    found, expected = made["logs"][name], RECORDED["logs"][name]
    if HOW == "exact":
        assert found == expected
    assert [row["update"] for row in found] == [row["update"] for row in expected]
    for now, before in zip(found, expected, strict=True):
        assert now.keys() == before.keys() and now["loss"] == pytest.approx(before["loss"], rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("name", RECORDED["grids"])
def test_grids(made, name):
    assert_picture(made["grids"][name], RECORDED["grids"][name])


def test_pictures_on_the_way(made):
    assert made["samples"].keys() == RECORDED["samples"].keys()
    for name, expected in RECORDED["samples"].items():
        assert_picture(made["samples"][name], expected)


# --- A run that an earlier version left in the middle of its second round ---


@pytest.fixture
def old(tmp_path, monkeypatch) -> dict:
    shutil.copytree(HERE / "old", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return RECORDED["old"]


def test_the_status_of_an_old_run(old):
    (found,) = json.loads(record.run("fastdiff.status stage2 --json"))
    assert {key: found[key] for key in old["status"]} == old["status"]


def test_pictures_of_an_old_model(old):
    record.run("fastdiff.sample --checkpoint stage2/steps-2 --guidance 1 --num 10 --device cpu --out old.png")
    assert_picture(record.picture_of(Path("old.png")), old["picture"])


def test_an_old_run_goes_on_by_the_command_that_status_gives(old):
    (found,) = json.loads(record.run("fastdiff.status stage2 --json"))
    start, line = found["command"].split(" -m ")
    assert start == "python"
    record.run(line)
    assert_weights(record.weights_of(Path("stage2/steps-1/model.safetensors")), old["weights"])
    (found,) = json.loads(record.run("fastdiff.status stage2 --json"))
    assert found["state"] == "finished" and found["share"] == 1
