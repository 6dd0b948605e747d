"""From a teacher that diffusers trained to a student that onnxruntime runs, one command a step.

Short here: everything runs, nothing is good yet. FASTDIFF_CHAINS=long trains for half an hour of one CPU core, says how
good (docs/results, "Digits: teachers that predict ε"), and asks for more than the teacher's own steps give.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import elsewhere, run  # noqa: F401

pytest.importorskip("diffusers")
import digits_of_diffusers

LONG = os.environ.get("FASTDIFF_CHAINS") == "long"
CPU = ("--device", "cpu")
FEW = ("--updates", 2, "--batch-size", 8)
NUM = 1024 if LONG else 30


def done(run, *line):  # noqa: F811
    result = run(*line)
    assert result.code == 0, (line, result)


def distance(run, *line) -> float:  # noqa: F811
    """Fréchet's, of the digits' own features."""
    done(run, "evaluate", *line, "--num", NUM, *CPU, "--overwrite")
    return json.loads(Path("results.json").read_text())["rows"][0]["fd"]


def told(student: float, teacher: dict[str, float]) -> None:
    print("Fréchet distances: student, 4 steps:", student, "teacher:", teacher)
    assert np.isfinite([student, *teacher.values()]).all()


def test_from_a_ddpm_to_onnx(run):  # noqa: F811
    onnxruntime = pytest.importorskip("onnxruntime")
    digits_of_diffusers.ddpm(Path("ddpm"), updates=4000 if LONG else 2)
    done(run, "import", "ddpm", "--out", "teacher")
    updates = () if LONG else FEW
    done(run, "stage1", "--teacher", "teacher", "--out", "stage1", *CPU, *updates)
    rounds = ("--start-steps", 32, "--end-steps", 4, *updates)
    done(run, "stage2", "--teacher", "stage1", "--out", "stage2", *CPU, *rounds)
    done(run, "export", "stage2/steps-4", "--format", "onnx", "--out", "student")
    session = onnxruntime.InferenceSession("student/model.onnx")
    (found,) = session.run(None, {"noise": torch.randn(5, 1, 8, 8).numpy()})
    assert found.shape == (5, 1, 8, 8) and np.isfinite(found).all() and np.abs(found).max() <= 1
    line = ("--guidance", 0, "--checkpoint")
    student, own = distance(run, *line, "stage2/steps-4"), distance(run, *line, "teacher", "--steps", 4)
    told(student, {"4 steps": own, "64 steps": distance(run, *line, "teacher", *(() if LONG else ("--steps", 2)))})
    assert student < own or not LONG


def test_from_a_dit_in_latents_to_four_steps(run):  # noqa: F811
    digits_of_diffusers.dit(Path("dit"), vae_updates=800 if LONG else 2, updates=1500 if LONG else 2)
    done(run, "import", "dit", "--out", "teacher")
    done(run, "latents", "--vae", "dit", "--data", "digits", *CPU)
    given = ("--data", "latents.safetensors", *CPU)
    updates = (("--updates", 300), ("--updates", 100)) if LONG else (FEW, FEW)
    done(run, "stage1", "--teacher", "teacher", "--out", "stage1", *given, *updates[0])
    rounds = ("--start-steps", 32, "--end-steps", 4, *updates[1])
    done(run, "stage2", "--teacher", "stage1", "--out", "stage2", *given, *rounds)
    line = ("--vae", "dit", "--steps", 4, "--guidance", 1, "--checkpoint")
    student, own = (distance(run, *line, name) for name in ("stage2/steps-4", "teacher"))
    told(student, {"4 steps": own})
    assert student < own or not LONG
