"""From a teacher that diffusers trained to a student that onnxruntime runs, one command a step.

Short here: everything runs, nothing is good yet. FASTDIFF_CHAINS=long trains for some 20 minutes and says how good.
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
FEW = () if LONG else ("--updates", 2, "--batch-size", 8)
NUM = 4096 if LONG else 30


def done(run, *line):  # noqa: F811
    result = run(*line)
    assert result.code == 0, (line, result)


def distance(run, *line) -> float:  # noqa: F811
    done(run, "evaluate", *line, "--num", NUM, "--device", "cpu", "--overwrite")
    return json.loads(Path("results.json").read_text())["rows"][0]["fd"]


def test_from_a_ddpm_to_onnx(run):  # noqa: F811
    onnxruntime = pytest.importorskip("onnxruntime")
    digits_of_diffusers.ddpm(Path("ddpm"), updates=4000 if LONG else 2)
    done(run, "import", "ddpm", "--out", "teacher")
    done(run, "stage1", "--teacher", "teacher", "--out", "stage1", "--device", "cpu", *FEW)
    rounds = ("--end-steps", 4, "--device", "cpu", *(FEW or ("--updates", 200)))
    done(run, "stage2", "--teacher", "stage1", "--out", "stage2", *rounds)
    done(run, "export", "stage2/steps-4", "--format", "onnx", "--out", "student")
    session = onnxruntime.InferenceSession("student/model.onnx")
    noise = torch.randn(5, 1, 8, 8)
    (found,) = session.run(None, {"noise": noise.numpy()})
    assert found.shape == (5, 1, 8, 8) and np.isfinite(found).all() and np.abs(found).max() <= 1
    teacher, student = (distance(run, "--checkpoint", name) for name in ("teacher", "stage2/steps-4"))
    assert np.isfinite([teacher, student]).all()
    if LONG:
        print(
            f"the teacher's 64 steps {teacher:.3f}, the student's 4 {student:.3f}: {student / teacher:.2f} times that"
        )
        assert student <= 1.3 * teacher
