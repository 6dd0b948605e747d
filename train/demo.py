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

from fastdiff import checks, cli, data, figures, files, lock
from fastdiff.denoiser import Denoiser, Guided
from fastdiff.errors import UserError
from fastdiff.evaluate import Reference, table
from fastdiff.generate import Sampling, generate
from fastdiff.losses import regression
from fastdiff.precision import Precision
from fastdiff.run import Run
from train import begin, rounds, sid, stage1, stage2, teacher
from train.batches import ImageBatches
from train.iteration import WARM_UP, Iteration
from train.options import LoopOptions
from train.report import page, pictures, timing
from train.report.methods import DEMO_NAMES, Method
from train.report.tables import demo_command, demo_report, with_steps
from train.updater import Loss, Updater

GUIDANCE = (0.0, 1.0, 4.0)
PICTURED = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
TEACHER_STEPS = (64, 8, 4, 2, 1)
STUDENT_STEPS = (8, 4, 2, 1)
SHARES = {"teacher": 0.22, "stage1": 0.18, "stage2": 0.38, "sid": 0.22}  # of the time for training
RESERVE = 0.07  # of all time, for what was measured too fast
SCORING = 0.5  # of the time, at most: where the machine is slow, models that are hardly trained would show nothing
ROUND_UNITS = 3.0  # a round of stage 2 with N ≤ 2 steps lasts as long as three others
TIMED_STEPS = 1024
TIMED_ROUNDS = 10


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
    background: str = "white"
    """What transparent pictures of the data are laid on: a colour, or none to drop their alpha."""
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
    with lock.held(options.out):
        demonstrate(options, Clock(60 * options.minutes))


def demonstrate(options: Options, clock: Clock) -> None:
    """What `main` does, in a folder of which this process is sure."""
    spec = options.data or options.preset
    print(f"[{clock}] data and feature extractor: {spec}")
    given = {key: getattr(options, key) for key in ("background", "device", "precision")}
    recipe = _options(teacher, options, "teacher", data=spec, **given)
    dataset = begin.training_data(recipe)
    begin.check_fit(teacher.RECIPE, teacher.denoiser_config(recipe, dataset), None, dataset, recipe)
    reference = Reference.load(spec, device=options.device, background=options.background)
    options = replace(options, precision=teacher.settled_precision(recipe))
    train_all(options, spec, clock)
    print(f"[{clock}] scores")
    rows, results = (
        [],
        {
            "command": demo_command(options),
            "reference": reference.describe(),
            "torch": torch.__version__,
            "device": options.device,
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "training": _training(options.out),
        },
    )

    def keep(**found: object) -> None:
        results.update(found)
        files.replace(options.out / "results.json", json.dumps(results, indent=1) + "\n")

    for method in methods(options):
        model = method.load(options)
        for w in GUIDANCE:
            rows.append(method.score(model, w, options, reference))
            keep(rows=[asdict(row) for row in rows])
    keep(timing=time_all(options))
    keep(pictures=samples(options, options.out / "samples.png", reference.dataset.class_names))
    figures.plot_quality(rows, reference.floor, options.out / "quality-vs-calls.png")
    keep(seconds_of_this_run=round(clock.elapsed()), peak_memory_gb=_peak_memory_gb())
    files.replace(options.out / "report.md", demo_report(results, options, GUIDANCE))
    print(table(rows, reference.describe()))
    page.write(options.out / page.NAME, [options.out])
    print(f"[{clock}] done: {options.out / 'report.md'}, and to play with: {options.out / page.NAME}")


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


def methods(options: Options) -> list[Method]:
    """The lines of the tables: the guided teacher with DDIM, its students, and SiD's generator."""
    at = options.out

    def line(key: str, checkpoint: Path, steps: int, sampler: str = "ddim") -> Method:
        return Method(key, DEMO_NAMES[key], "D", checkpoint, sampler, steps, GUIDANCE)

    teachers = [line("teacher", at / "teacher", n) for n in TEACHER_STEPS]
    students = [line("deterministic", at / "stage2" / rounds.round_name(n), n) for n in STUDENT_STEPS]
    return [*teachers, *students, line("sid", at / "sid", 1, "one_step")]


def train_all(options: Options, spec: str, clock: Clock) -> None:
    """Run, continue or reuse the four recipes; each gets its share of the time that is left when it starts."""
    common = {key: getattr(options, key) for key in ("background", "device", "precision", "seed")} | {"data": spec}
    dataset = data.load(spec, "train", background=options.background)

    recipe = _options(teacher, options, "teacher", **common)
    fresh = Denoiser(teacher.denoiser_config(recipe, dataset)).to(options.device)
    evaluation = min(_evaluation_seconds(fresh, options), SCORING * clock.left())
    remaining = dict(SHARES)

    def planned(name: str, recipe: LoopOptions, trial: Callable[[], Iteration], units: float) -> LoopOptions:
        """The recipe with as many updates as its share of the time allows, or as many as it was begun with."""
        share = remaining.pop(name) / (sum(remaining.values()) + SHARES[name])
        if (updates := _begun(recipe.out)) is None:
            seconds = max(0.0, clock.left() - evaluation) * share
            updates = max(20, int(seconds / _update_seconds(trial()) / units))
        print(f"[{clock}] {name}: {updates} updates{' a round' if name == 'stage2' else ''}")
        halves = name in ("teacher", "stage1")  # the others are short by themselves, or in their rounds
        return replace(
            recipe,
            updates=updates,
            save_every=max(1, updates // 2) if halves else updates,
            resume=recipe.out.exists(),
        )

    def images(model: Denoiser, loss: Loss, recipe: LoopOptions) -> Iteration:
        updater = Updater(recipe, copy.deepcopy(model).requires_grad_(True), loss)
        return Iteration([updater], ImageBatches(dataset, recipe, 0, updater.device), recipe)

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

    recipe = _options(sid, options, "sid", teacher=options.out / "stage1", score_num=max(2, options.num // 4), **common)
    recipe = planned("sid", recipe, lambda: Iteration(*sid.learning(first, recipe), recipe), 1)
    sid.train(recipe)


def time_all(options: Options) -> dict:
    """Wall-clock of one batch: the 1024-step guided teacher against few-step students, in one run."""
    by = {(method.key, method.steps): (method, 1.0) for method in methods(options)}
    fast = {"4_step_student": by["deterministic", 4], "1_step_student": by["deterministic", 1], "sid": by["sid", 1]}
    slow = by["teacher", 64][0]._replace(steps=TIMED_STEPS), 1.0
    times = timing.rounds([*fast.values()], [slow], options, count=TIMED_ROUNDS, first=TIMED_ROUNDS // 2 - 1)
    (longest,) = times[slow]
    ratios = {name: round(longest / statistics.median(times[one]), 1) for name, one in fast.items()}
    return {
        "batch": timing.BATCH,
        "guidance": 1.0,
        "teacher_steps": TIMED_STEPS,
        **{f"teacher_over_{name}": ratio for name, ratio in ratios.items()},
    }


def samples(options: Options, path: Path, class_names: tuple[str, ...]) -> dict:
    """Pictures of all lines at every w in PICTURED, and some side by side, at w = 1; returns what was drawn."""
    drawn = pictures.draw(methods(options), options, options.out, class_names, strengths=PICTURED, again=True)
    shown = [one for one in methods(options) if one.key != "teacher" or one.steps in (64, 4, 1)]
    titles = {with_steps(one.key if one.key == "teacher" else one.name, one.steps): one for one in shown}
    figures.save_panels(pictures.panels(titles, 1.0, options.out, drawn), path, columns=pictures.NOISES)
    return drawn


def _options(recipe, options: Options, name: str, **fields) -> LoopOptions:
    return recipe.Options(
        **(recipe.PRESETS[options.preset] | {"preset": options.preset, "out": options.out / name} | fields)
    )


def _begun(out: Path) -> int | None:
    """The updates that a run in this folder was begun with."""
    try:
        return Run(out).config()["options"]["updates"]
    except UserError:
        return None


def _update_seconds(iterate: Iteration, trials: int = 8) -> float:
    """Median time of an update of all networks that learn."""
    times = []
    for _ in range(trials + WARM_UP):
        start = time.perf_counter()
        iterate()
        for updater in iterate.updaters:
            updater.check_finite()  # waits for the device
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])


def _evaluation_seconds(model: Denoiser, options: Options) -> float:
    """What scores, pictures and timing will take, from the time of one network call."""
    batch = 256
    times = []
    for _ in range(4):
        start = time.perf_counter()
        for images in generate(model, batch, Sampling(steps=1, batch_size=batch, precision=options.precision)):
            images.cpu()
        times.append(time.perf_counter() - start)

    def calls(strengths: tuple[float, ...]) -> int:
        return sum((2 if w else 1) * sum(TEACHER_STEPS) + sum(STUDENT_STEPS) + 1 for w in strengths)

    shown = pictures.NOISES * len(pictures.shown_classes(model.num_classes))
    rows = calls(GUIDANCE) * options.num + calls(PICTURED) * shown + 2 * TIMED_STEPS * timing.BATCH
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
        for row in Run(out / name).metrics.rows():
            run = runs.setdefault(row["run"], {"run": row["run"], "updates": 0, "images": 0, "seconds": 0.0})
            run["seconds"] += (row["images"] - run["images"]) / row["images_per_second"]
            run["updates"], run["images"] = row["update"], row["images"]
    return [run | {"seconds": round(run["seconds"], 1)} for run in runs.values()]


if __name__ == "__main__":
    cli.run(main, Options)
