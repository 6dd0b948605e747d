"""The whole pipeline on the embedded data set, in `--minutes` minutes: four recipes, scores and pictures."""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from fastdiff import checkpoint, checks, cli, data, figures
from fastdiff.denoiser import Denoiser, Guided
from fastdiff.errors import UserError
from fastdiff.evaluate import Reference, evaluate, table
from fastdiff.generate import Sampling, generate
from fastdiff.losses import regression
from fastdiff.metrics import Row, find
from fastdiff.precision import Precision
from train import loop, rounds, sid, stage1, stage2, teacher

GUIDANCE = (0.0, 1.0, 4.0)
TEACHER_STEPS = (64, 8, 4, 2, 1)
STUDENT_STEPS = (8, 4, 2, 1)
SHARES = {"teacher": 0.22, "stage1": 0.18, "stage2": 0.38, "sid": 0.22}  # of the time for training
RESERVE = 0.07  # of all time, for what was measured too fast
SCORING = 0.5  # of the time, at most: where the machine is slow, models that are hardly trained would show nothing
ROUND_UNITS = 3.0  # a round of stage 2 with N ≤ 2 steps lasts as long as three others
TIMED_STEPS = 1024
TIMED_BATCH = 128


@dataclass(frozen=True, kw_only=True)
class Options:
    out: Path = Path("runs/demo")
    """Running again into the same folder continues what is there."""
    minutes: float = 10.0
    """Time for everything; training is scaled to what there is."""
    preset: str = "digits"
    """digits or fashion-mnist."""
    data: str | None = None
    """Default: the preset's."""
    num: int = 1024
    """Samples a score."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    precision: Precision = "fp32"
    """auto: bf16 where it is found to be faster and within 2e-2 of fp32, for all of the runs alike."""
    seed: int = 0


def main(options: Options) -> None:
    """Teacher, stage 1, stage 2, SiD, scores and pictures on the embedded data set."""
    if not options.minutes > 0:
        raise UserError(f"--minutes must be positive, got {options.minutes:g}")
    if options.num < 2:
        raise UserError(f"--num {options.num}: a score needs at least 2 images")
    if options.preset not in ("digits", "fashion-mnist"):
        raise UserError(f"unknown preset {options.preset!r} of the demo; known: digits, fashion-mnist")
    checks.device(options.device)
    checks.folder(options.out)
    clock = Clock(60 * options.minutes)
    spec = options.data or options.preset
    print(f"[{clock}] data and feature extractor: {spec}")
    reference = Reference.load(spec, device=options.device)
    recipe = _options(teacher, options, "teacher", data=spec, device=options.device, precision=options.precision)
    options = replace(options, precision=teacher.settled_precision(recipe))
    models = train_all(options, spec, clock)
    print(f"[{clock}] scores")
    rows = score_all(options, models, reference)
    timing = time_all(models, options)
    samples(models, options.out / "samples.png", options.seed)
    figures.plot_quality(rows, reference.floor, options.out / "quality-vs-calls.png")
    results = {
        "reference": reference.describe(),
        "rows": [asdict(row) for row in rows],
        "timing": timing,
        "training": _training(options.out),
        "seconds_of_this_run": round(clock.elapsed()),
        "torch": torch.__version__,
        "device": options.device,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "peak_memory_gb": _peak_memory_gb(),
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "report.md").write_text(report(results, options))
    print(table(rows, reference.describe()))
    print(f"[{clock}] done: {options.out / 'report.md'}")


class Clock:
    """The time since the start and what is left of the budget, in seconds."""

    def __init__(self, budget: float):
        self.start, self.budget = time.perf_counter(), budget

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def left(self) -> float:
        return self.budget * (1 - RESERVE) - self.elapsed()

    def __str__(self) -> str:
        return f"{self.elapsed() / 60:4.1f} min"


@dataclass(frozen=True)
class Models:
    guided: Guided
    stage1: Denoiser
    students: dict[int, Denoiser]
    sid: Denoiser

    def rows(self) -> list[tuple[str, torch.nn.Module, int]]:
        """(name, model, steps) of each line of the tables."""
        rows = [("teacher, DDIM", self.guided, steps) for steps in TEACHER_STEPS]
        return [*rows, *(("student", self.students[steps], steps) for steps in STUDENT_STEPS), ("SiD", self.sid, 1)]


def train_all(options: Options, spec: str, clock: Clock) -> Models:
    """Run, continue or reuse the four recipes; each gets its share of the time that is left when it starts."""
    common = {"data": spec, "device": options.device, "precision": options.precision, "seed": options.seed}
    dataset = data.load(spec, "train")

    recipe = _options(teacher, options, "teacher", **common)
    fresh = Denoiser(teacher.denoiser_config(recipe, dataset)).to(options.device)
    evaluation = min(_evaluation_seconds(fresh, options), SCORING * clock.left())
    remaining = dict(SHARES)

    def planned(
        name: str, recipe: loop.LoopOptions, trial: Callable[[], tuple[list[loop.Updater], loop.Batches]], units: float
    ) -> loop.LoopOptions:
        """The recipe with as many updates as its share of the time allows, or as many as it was begun with."""
        share = remaining.pop(name) / (sum(remaining.values()) + SHARES[name])
        if (updates := _begun(recipe.out)) is None:
            seconds = max(0.0, clock.left() - evaluation) * share
            updates = max(20, int(seconds / _update_seconds(*trial()) / units))
        print(f"[{clock}] {name}: {updates} updates{' a round' if name == 'stage2' else ''}")
        halves = name in ("teacher", "stage1")  # the others are short by themselves, or in their rounds
        return replace(
            recipe,
            updates=updates,
            save_every=max(1, updates // 2) if halves else updates,
            resume=recipe.out.exists(),
        )

    def images(model: Denoiser, loss: loop.Loss, recipe: loop.LoopOptions):
        copied = copy.deepcopy(model).requires_grad_(True)
        return [loop.Updater(recipe, copied, loss)], loop.ImageBatches(dataset, recipe, 0, torch.device(options.device))

    recipe = planned("teacher", recipe, lambda: images(fresh, regression.teacher, recipe), 1)
    guided = Guided(teacher.train(recipe))

    recipe = _options(stage1, options, "stage1", teacher=recipe.out, **common)
    limits = recipe.guidance_range
    student = stage1.student_of(guided.denoiser, limits)
    matching = partial(regression.stage1, teacher=guided, guidance_range=limits)
    recipe = planned("stage1", recipe, lambda: images(student, lambda m, b: matching(m, batch=b), recipe), 1)
    first = stage1.train(recipe)

    recipe = _options(stage2, options, "stage2", teacher=options.out / "stage1", **common)
    all_steps = rounds.student_steps(recipe.start_steps, recipe.end_steps)
    units = sum(ROUND_UNITS if steps <= 2 else 1 for steps in all_steps)
    halving = partial(regression.stage2, teacher=first, steps=8, guidance_range=limits)
    recipe = planned("stage2", recipe, lambda: images(first, lambda m, b: halving(m, batch=b), recipe), units)
    stage2.train(replace(recipe, last_updates=int(ROUND_UNITS * recipe.updates)))
    students = {n: checkpoint.load(recipe.out / f"steps-{n}", device=options.device) for n in STUDENT_STEPS}

    recipe = _options(sid, options, "sid", teacher=options.out / "stage1", score_num=max(2, options.num // 4), **common)
    recipe = planned("sid", recipe, lambda: sid.learning(first, recipe), 1)
    generator = sid.train(recipe)
    return Models(guided, first, students, generator)


def score_all(options: Options, models: Models, reference: Reference) -> list[Row]:
    """The guided teacher with DDIM and its students, at each guidance strength."""
    rows = []
    for name, model, steps in models.rows():
        for w in GUIDANCE:
            sampling = Sampling(guidance=w, steps=steps, seed=options.seed, precision=options.precision)
            rows.append(evaluate(model, reference, sampling, name=name, num=options.num))
    return rows


def time_all(models: Models, options: Options) -> dict:
    """Wall-clock of one batch: the 1024-step guided teacher against few-step students, in one run."""

    how = Sampling(guidance=1.0, seed=options.seed, batch_size=TIMED_BATCH, precision=options.precision)

    def seconds(model: torch.nn.Module, steps: int) -> float:
        start = time.perf_counter()
        for images in generate(model, TIMED_BATCH, replace(how, steps=steps)):
            images.cpu()
        return time.perf_counter() - start

    timed = {"4_step_student": (models.students[4], 4), "1_step_student": (models.students[1], 1)}
    timed["sid"] = (models.sid, 1)
    times: dict[str, list[float]] = {name: [] for name in timed}

    def time_students(trials: int) -> None:
        for _ in range(trials):
            for name, (model, steps) in timed.items():
                times[name].append(seconds(model, steps))

    time_students(1)  # warms up
    seconds(models.guided, 2)
    times = {name: [] for name in timed}
    time_students(5)
    slow = seconds(models.guided, TIMED_STEPS)
    time_students(5)  # before and after, so that a change of the machine's speed shows on both sides
    return {
        "batch": TIMED_BATCH,
        "guidance": 1.0,
        "teacher_steps": TIMED_STEPS,
        **{f"teacher_over_{name}": round(slow / statistics.median(found), 1) for name, found in times.items()},
    }


def samples(models: Models, path: Path, seed: int, *, columns: int = 5, guidance: float = 1.0) -> None:
    """Teacher and students side by side: one row a class, one column a noise, the same in every panel."""
    classes = models.guided.num_classes
    panels = [("teacher", models.guided, steps) for steps in (64, 4, 1)]
    panels += [("student", models.students[steps], steps) for steps in STUDENT_STEPS] + [("SiD", models.sid, 1)]
    drawn = []
    for name, model, steps in panels:
        labels, ids = torch.arange(classes).repeat_interleave(columns), torch.arange(columns).repeat(classes)
        images = generate(model, labels, Sampling(guidance=guidance, steps=steps, seed=seed), noise_ids=ids)
        drawn.append((_with_steps(name, steps), torch.cat([part.cpu() for part in images])))
    figures.save_panels(drawn, path, columns=columns)


def report(results: dict, options: Options) -> str:
    """report.md: the table, the figures that matter, and how to make it again."""
    rows, timing = [Row(**row) for row in results["rows"]], results["timing"]
    training = sum(run["seconds"] for run in results["training"])

    def fd(model: str, steps: int, w: float) -> float:
        return find(rows, model, steps, w).fd

    lines = [
        f"# {options.preset}: a guided teacher and its few-step students",
        "",
        f"Made by `python -m train.demo --preset {options.preset} --minutes {options.minutes:g} --num {options.num} "
        f"--seed {options.seed} --precision {options.precision}`.",
        "",
        table(rows, results["reference"]),
        "",
        "![samples](samples.png)",
        "",
        "Same noise and class in every panel; guidance w = 1.",
        "",
        "![quality against network calls](quality-vs-calls.png)",
        "",
        "| Fréchet distance, relative to the 64-step guided teacher's at the same w | "
        + " | ".join(f"w = {w:g}" for w in GUIDANCE)
        + " |",
        "|---|" + "---:|" * len(GUIDANCE),
    ]
    for model, all_steps in (("teacher, DDIM", TEACHER_STEPS[1:]), ("student", STUDENT_STEPS), ("SiD", (1,))):
        for steps in all_steps:
            cells = (f"{fd(model, steps, w) / fd('teacher, DDIM', 64, w):.2f}" for w in GUIDANCE)
            lines.append(f"| {_with_steps(model, steps)} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Training took {training / 60:.1f} minutes in all (below), this run of the command "
        f"{results['seconds_of_this_run'] / 60:.1f} minutes (it reuses what earlier ones finished), on "
        f"{results['cores']} cores ({results['machine']}, {results['device']}), with "
        f"{results['peak_memory_gb']} GB of memory at most.",
        "",
        f"Wall-clock per image, one batch of {timing['batch']}, same run: the {timing['teacher_steps']}-step guided "
        f"teacher takes {timing['teacher_over_4_step_student']:.0f} times as long as the 4-step student, "
        f"{timing['teacher_over_1_step_student']:.0f} times as long as the 1-step student and "
        f"{timing['teacher_over_sid']:.0f} times as long as the SiD generator.",
        "",
        "| run | updates | images | minutes |",
        "|---|---:|---:|---:|",
    ]
    for run in results["training"]:
        lines.append(f"| {run['run']} | {run['updates']} | {run['images']} | {run['seconds'] / 60:.1f} |")
    return "\n".join(lines) + "\n"


def _with_steps(name: str, steps: int) -> str:
    return f"{name}, {steps} step{'s' * (steps > 1)}"


def _options(recipe, options: Options, name: str, **fields) -> loop.LoopOptions:
    return recipe.Options(
        **(recipe.PRESETS[options.preset] | {"preset": options.preset, "out": options.out / name} | fields)
    )


def _begun(out: Path) -> int | None:
    """The updates that a run in this folder was begun with."""
    try:
        return json.loads((out / "config.json").read_text())["options"]["updates"]
    except (OSError, ValueError, KeyError):
        return None


def _update_seconds(updaters: list[loop.Updater], batches: loop.Batches, trials: int = 8) -> float:
    """Median time of an update of all networks that learn."""
    times = []
    for _ in range(trials + 2):
        start = time.perf_counter()
        for updater in updaters:
            loop.update_alone(updater, updaters, next(batches))
            updater.check_finite()  # waits for the device
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def _evaluation_seconds(model: Denoiser, options: Options) -> float:
    """What scoring and timing will take, from the time of one network call."""
    batch = 256
    times = []
    for _ in range(4):
        start = time.perf_counter()
        for images in generate(model, batch, Sampling(steps=1, batch_size=batch, precision=options.precision)):
            images.cpu()
        times.append(time.perf_counter() - start)
    calls = sum(2 if w else 1 for w in GUIDANCE) * sum(TEACHER_STEPS) + len(GUIDANCE) * (sum(STUDENT_STEPS) + 1)
    rows = calls * options.num + 2 * TIMED_STEPS * TIMED_BATCH
    return 1.1 * rows * statistics.median(times[1:]) / batch


def _peak_memory_gb() -> float | None:
    """Largest resident memory of this process so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def _training(out: Path) -> list[dict]:
    """Updates, images and seconds of each run, from the logs."""
    runs: dict[str, dict] = {}
    for name in ("teacher", "stage1", "stage2", "sid"):
        for line in (out / name / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            run = runs.setdefault(row["run"], {"run": row["run"], "updates": 0, "images": 0, "seconds": 0.0})
            run["seconds"] += (row["images"] - run["images"]) / row["images_per_second"]
            run["updates"], run["images"] = row["update"], row["images"]
    return [run | {"seconds": round(run["seconds"], 1)} for run in runs.values()]


if __name__ == "__main__":
    cli.run(main, Options)
