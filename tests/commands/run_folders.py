"""Runs' and comparisons' folders as they are at any moment, without any training."""

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from common import TINY, save_model
from PIL import Image

from fastdiff import checkpoint
from fastdiff.data import to_uint8
from fastdiff.denoiser import Denoiser, DenoiserConfig, with_guidance
from fastdiff.generate import Sampling, generate
from train import begin as recipes
from train import stage2, teacher
from train.report import pictures
from train.report.methods import NAMES, Method

NOW = 2_000_000_000.0


def begin(options, recipe: str | None, *, old: bool = False) -> Path:
    """A run's folder as it is before the first update; old: of a version that wrote down neither plan nor command."""
    options.out.mkdir(parents=True)
    if old or recipe is None or not recipe.startswith("train."):
        config = {"options": options.plain(), "data_fingerprint": "0"} | ({"recipe": recipe} if recipe else {})
    else:
        config = recipes.describe(sys.modules[recipe].RECIPE, options, None)
    (options.out / "config.json").write_text(json.dumps(config))
    return options.out


def log(run: Path, name: str, *updates: int, batch_size: int = 64, **values) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        for n in updates:
            row = {"run": name, "update": n, "images": n * batch_size, "loss": 1 / n, "grad_norm": 0.5, "lr": 1e-3}
            row |= {"loss_quarters": [4 / n, 3 / n, 2 / n, 1 / n], "images_per_second": 32.0, "time": NOW} | values
            file.write(json.dumps(row) + "\n")


def save(run: Path, name: str, update: int, kind: str = "teacher") -> Path:
    state = {"run": name, "update": update}
    denoiser = Denoiser(DenoiserConfig(TINY, kind=kind))
    return checkpoint.save(run / f"checkpoint-{update:07d}", denoiser, state=state, state_tensors={})


def age(run: Path, seconds: float) -> None:
    """All was last written so long before NOW."""
    for path in run.rglob("*"):
        os.utime(path, (NOW - seconds, NOW - seconds))


def make_teacher(tmp_path, **changes) -> Path:
    return begin(teacher.Options(**({"out": tmp_path / "teacher", "device": "cpu"} | changes)), "train.teacher")


def make_stage2(tmp_path) -> Path:
    """Rounds of 8, 4, 2, 1 steps with 100, 100, 300, 300 updates."""
    options = stage2.Options(
        teacher=Path("runs/stage1"), out=tmp_path / "stage2", start_steps=16, updates=100, last_updates=300
    )
    return begin(options, "train.stage2")


def score(run: Path, name: str, update: int, **values) -> None:
    with open(run / "scores.jsonl", "a") as file:
        file.write(json.dumps({"run": name, "update": update, "images": 64 * update} | values) + "\n")


def draw(run: Path, name: str, *updates: int, side: int = 20) -> None:
    """A picture of an update's number."""
    for n in updates:
        Image.new("L", (side, side), n % 256).save(run / f"samples-{name}-{n:07d}.png")


@dataclass(frozen=True)
class Comparison:
    """A comparison of untrained models, as train.compare leaves it, with invented scores."""

    out: Path
    methods: list[Method]
    options: SimpleNamespace
    results: dict

    def save(self, **changes) -> None:
        (self.out / "results.json").write_text(json.dumps(self.results | changes))

    def drawn(self, name: str, steps: int, w: float) -> np.ndarray:
        """What sampling makes of the noises and classes of the page: (5·H, K·W) uint8."""
        method = next(one for one in self.methods if (one.name, one.steps) == (name, steps))
        classes = len(self.results["pictures"]["class_names"])
        label, ids = torch.arange(classes).repeat(5), torch.arange(5).repeat_interleave(classes)
        model = with_guidance(checkpoint.load(method.checkpoint))
        sampling = Sampling(guidance=w, steps=steps, sampler=method.sampler)
        images = to_uint8(torch.cat(list(generate(model, label, sampling, noise_ids=ids))))
        return images.reshape(5, classes, 8, 8).permute(0, 2, 1, 3).reshape(40, 8 * classes).numpy()


def make_comparison(out: Path, *, strengths=(0.0, 1.0, 4.0), pictured=(0.0, 0.5, 1.0, 4.0), teacher=3.0) -> Comparison:
    """The teacher has the distance `teacher` with 8 steps; the student 3.1 with 2 steps, and 6 with one."""
    save_model(out / "teacher")
    for steps in (2, 1):
        given = {"kind": "stage2", "guidance_range": (0.0, 4.0), "sampler": "ddim", "steps": steps}
        save_model(out / f"stage2/steps-{steps}", unet=replace(TINY, guidance_input=True), seed=steps, **given)
    methods = [Method("teacher", NAMES["teacher"], "D", out / "teacher", "ddim", n, strengths) for n in (8, 2, 1)]
    methods += [
        Method("deterministic", NAMES["deterministic"], "D", out / f"stage2/steps-{n}", "ddim", n, strengths)
        for n in (2, 1)
    ]
    options = SimpleNamespace(num=100, device="cpu", precision="fp32", seed=0)
    fd = {("teacher", 8): teacher, ("teacher", 2): 9.0, ("teacher", 1): 20.0, ("deterministic", 2): 3.1}
    rows = [
        {"model": one.name, "sampler": one.sampler, "steps": one.steps, "letter": one.letter, "guidance": w}
        | {"nfe": one.steps * (2.0 if one.key == "teacher" and w else 1.0), "num": 100, "seed": 0}
        | {"fd": fd.get((one.key, one.steps), 6.0) + w, "score": 5 + w / (2 + one.steps), "images_per_second": 10.0}
        for one in methods
        for w in strengths
    ]
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    results = {
        "options": {"preset": "digits", "num": 100, "seed": 0, "precision": "fp32", "updates": [3, 2, 1]},
        "rows": rows,
        "reference": {"data": "digits", "split": "train", "images": 1438, "extractor": "classifier1/digits"}
        | {"extractor_test_accuracy": 0.99, "half_against_half_fd": 0.42, "score": 9.9},
        "pictures": pictures.draw(methods, options, out, names, strengths=pictured),
    }
    made = Comparison(out, methods, options, results)
    made.save()
    return made
