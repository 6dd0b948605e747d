"""Command lines, run in the tests' own process, and what they are given and refuse."""

import io
import json
import runpy
import sys
import zipfile
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from train import commands

MODULES = {name: module for name, (module, _) in commands.COMMANDS.items()}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command as `python -m` does, but in this process: importing torch anew would take seconds each time."""

    def run_(command, *arguments):
        monkeypatch.setattr(sys, "argv", [command, *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            if command in MODULES:
                runpy.run_module(MODULES[command], run_name="__main__", alter_sys=True)
            else:
                assert command == "fastdiff"
                commands.main()
        except SystemExit as stop:
            code = stop.code or 0
        return Result(code, *capsys.readouterr())

    return run_


def assert_refused(result, *parts):
    """Exit code 2 and one sentence that holds all the parts."""
    assert result.code == 2, result
    lines = result.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    assert len(lines[0]) < 700
    for part in parts:
        assert str(part) in lines[0]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTDIFF_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def write_images(folder, *, count=12, size=(8, 8), classes=("a", "b"), channels=3):
    for index in range(count):
        place = folder / classes[index % len(classes)] if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (*size, channels), dtype=np.uint8)
        Image.fromarray(pixels.squeeze()).save(place / f"{index:02d}.png")
    return folder


def write_zip(path, labels):
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(len(labels)):
            content = io.BytesIO()
            Image.new("L", (8, 8), index).save(content, "png")
            archive.writestr(f"{index}.png", content.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": [[f"{i}.png", v] for i, v in enumerate(labels)]}))
    return path
