"""Every method of [GD] on one teacher, in tables like its own: `python -m fastdiff.compare --preset digits`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from fastdiff import checkpoint, cli, data, figures
from fastdiff.denoiser import with_guidance
from fastdiff.errors import UserError
from fastdiff.evaluate import Reference, evaluate
from fastdiff.sample import check_device, generate, make_folder
from fastdiff.translate import Pair, rmse
from train import encoder, loop, stage1, stage2, teacher, two_student

STUDENT_STEPS = (16, 8, 4, 2, 1)
ENCODER_STEPS = 8
RECONSTRUCTED = 256  # images
LAST_ROUNDS = 3  # how many times as long the rounds with 2 steps and with 1 are
UPDATES = {"digits": (2800, 1900, 300), "fashion-mnist": (8000, 6000, 1000)}  # teacher, stage 1, a round


@dataclass(frozen=True, kw_only=True)
class Options:
    preset: Literal["digits", "fashion-mnist"] = "digits"
    out: Path = Path("runs/compare")
    """Runs, tables and figures; running again into the same folder continues what is there."""
    guidance: tuple[float, ...] = (0.0, 0.3, 1.0, 2.0, 4.0)
    """The columns of the tables."""
    fixed_guidance: tuple[float, ...] = (1.0,)
    """w for which a student without a w input, and two students, are distilled too."""
    teacher_steps: tuple[int, ...] = (1024, 256, 64, 16, 8, 4, 2, 1)
    num: int = 1024
    """Samples a score."""
    updates: tuple[int, int, int] | None = None
    """Updates of the teacher, of stage 1, and of a round of stage 2; default: the preset's."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0


class Method(NamedTuple):
    """One line of the tables: a model with a sampler and a number of steps, scored at some w."""

    name: str
    letter: str
    """D for a deterministic sampler, S for a stochastic one, as in the paper's tables."""
    checkpoint: Path
    sampler: str
    steps: int
    guidance: tuple[float, ...]


def main(options: Options) -> None:
    """Train every method of the paper on one teacher, score all, and write tables and figures."""
    check(options)
    make_folder(options.out)
    reference = Reference.load(options.preset, device=options.device)
    results = load_results(options)
    train_all(options)
    for method in methods(options):
        score(method, options, reference, results)
    results["reconstruction"] = reconstruction(options)
    results["reference"] = reference.describe()
    save_results(options, results)
    (options.out / "report.md").write_text(report(results, options))
    draw(results, options, reference)
    print(f"done: {options.out / 'report.md'}")


def check(options: Options) -> None:
    """Raises UserError for options that make no sense."""
    check_device(options.device)
    if options.num < 2:
        raise UserError(f"--num {options.num}: a score needs at least 2 images")
    if any(not 0 <= w < float("inf") for w in (*options.guidance, *options.fixed_guidance)):
        raise UserError("--guidance and --fixed-guidance must be numbers ≥ 0")
    if not options.guidance or not options.teacher_steps or min(options.teacher_steps) < 1:
        raise UserError("--guidance and --teacher-steps need at least one value, and steps must be positive")
    if options.updates is not None and min(options.updates) < 1:
        raise UserError(f"--updates must be three positive numbers, got {options.updates}")


def train_all(options: Options) -> None:
    """Run, continue or reuse every recipe."""
    first, second, each = options.updates or UPDATES[options.preset]
    run = _recipe(options)
    halving = {"updates": each, "last_updates": LAST_ROUNDS * each, "save_every": LAST_ROUNDS * each}
    teacher.train(run(teacher, "teacher", updates=first))
    at = options.out
    low, high = 0.0, max(4.0, *options.guidance)
    stage1.train(run(stage1, "stage1", updates=second, teacher=at / "teacher", guidance_range=(low, high)))
    stage2.train(run(stage2, "stage2", teacher=at / "stage1", **halving))
    stage2.train(run(stage2, "stochastic", teacher=at / "stage1", sampler="stochastic", **halving))
    for w in options.fixed_guidance:
        fixed = f"fixed-w{w:g}"
        stage1.train(run(stage1, f"{fixed}-stage1", updates=second, teacher=at / "teacher", guidance_range=(w, w)))
        stage2.train(run(stage2, fixed, teacher=at / f"{fixed}-stage1", **halving))
        stage_two = run(two_student, f"two-student-w{w:g}", teacher=at / "teacher", guidance=w, **halving)
        two_student.train(stage_two)
    encoder.train(run(encoder, "encoder", teacher=at / "stage1", end_steps=ENCODER_STEPS, **halving))


def _recipe(options: Options):
    """(module, folder, options) -> the recipe's options with the preset's settings, to start or to continue."""

    def build(module, name: str, **changes) -> loop.LoopOptions:
        out = options.out / name
        common = {key: getattr(options, key) for key in ("preset", "device", "precision", "seed")}
        settings = module.PRESETS[options.preset] | common | {"out": out, "resume": out.exists()} | changes
        print(f"{name}: {settings['updates']} updates", flush=True)
        return module.Options(**settings)

    return build


def methods(options: Options) -> Iterator[Method]:
    """All lines of the tables, cheapest first, so that an interrupted run has most of them."""
    at, every = options.out, options.guidance
    for steps in reversed(STUDENT_STEPS):
        yield Method("stage 1 and 2", "D", at / "stage2" / f"steps-{steps}", "ddim", steps, every)
        yield Method("stage 1 and 2, stochastic", "S", at / "stochastic" / f"steps-{steps}", "stochastic", steps, every)
        yield Method("stage 1 alone", "D", at / "stage1", "ddim", steps, every)
        for w in options.fixed_guidance:
            fixed, two = at / f"fixed-w{w:g}", at / f"two-student-w{w:g}"
            yield Method(f"fixed w = {w:g}", "D", fixed / f"steps-{steps}", "ddim", steps, (w,))
            yield Method(f"two students, w = {w:g}", "D", two / f"steps-{steps}", "ddim", steps, (w,))
    for steps in sorted(options.teacher_steps):
        yield Method("guided teacher, DDIM", "D", at / "teacher", "ddim", steps, every)
        yield Method("guided teacher, ancestral", "S", at / "teacher", "ancestral", steps, every)


def score(method: Method, options: Options, reference: Reference, results: dict) -> None:
    """Add the rows of a method that `results` does not have, and save after each."""
    model = None
    for w in method.guidance:
        if find(results["rows"], method.name, method.steps, w) is not None:
            continue
        model = model or with_guidance(checkpoint.load(method.checkpoint, device=options.device))
        row = evaluate(
            model, reference, name=method.name, guidance=w, steps=method.steps, num=options.num,
            sampler=method.sampler, seed=options.seed, precision=options.precision,
        )  # fmt: skip
        results["rows"].append(row | {"letter": method.letter})
        save_results(options, results)
        print(json.dumps(row), flush=True)


def find(rows: list[dict], name: str, steps: int, w: float) -> dict | None:
    """The row of a method at a number of steps and a strength."""
    return next((row for row in rows if (row["model"], row["steps"], row["guidance"]) == (name, steps, w)), None)


def reconstruction(options: Options) -> list[dict]:
    """A -> A through the distilled encoder and decoder, and by DDIM with as many and with twice as many calls."""
    dataset = data.load(options.preset, "test")
    evenly = torch.arange(RECONSTRUCTED) * len(dataset) // RECONSTRUCTED
    images = data.to_float(torch.from_numpy(dataset.images[evenly.numpy()]))
    labels = torch.from_numpy(dataset.labels[evenly.numpy()])
    load = lambda name: with_guidance(checkpoint.load(options.out / name, device=options.device))  # noqa: E731
    encoder_, decoder, first, guided = (
        load(name) for name in (f"encoder/steps-{ENCODER_STEPS}", f"stage2/steps-{ENCODER_STEPS}", "stage1", "teacher")
    )
    distilled = Pair(encoder_, decoder, ENCODER_STEPS, ENCODER_STEPS)
    rows = []
    for w in options.guidance:
        pairs = {"distilled encoder and decoder": distilled}
        for name, model in (("stage 1", first), ("guided teacher", guided)):
            pairs[f"{name}, DDIM, as many calls"] = distilled.undistilled(model, w)
            pairs[f"{name}, DDIM, twice the calls"] = distilled.undistilled(model, w, factor=2)
        for name, pair in pairs.items():
            error = rmse(pair.translate(images, labels, labels, w), images)
            rows.append({"pair": name, "guidance": w, "calls": pair.calls(w), "rmse": round(error, 5)})
    return rows


def load_results(options: Options) -> dict:
    """What an earlier run into the same folder has scored. Raises UserError where it had other options."""
    path = options.out / "results.json"
    now = {key: getattr(options, key) for key in ("preset", "num", "seed", "precision")}
    now["updates"] = list(options.updates or UPDATES[options.preset])
    if not path.is_file():
        return {"options": now, "rows": []}
    try:
        results = json.loads(path.read_text())
        before, _ = results["options"], results["rows"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no result of fastdiff.compare: move it away, or choose another --out") from None
    if before != now:
        raise UserError(f"{path} was made with {before}, and this run has {now}: choose another --out")
    return results


def save_results(options: Options, results: dict) -> None:
    beside = options.out / "results.json.writing"
    beside.write_text(json.dumps(results, indent=1) + "\n")
    beside.replace(options.out / "results.json")


def report(results: dict, options: Options) -> str:
    """Tables laid out as the paper's: rows method × steps with D or S, columns w."""
    rows, reference = results["rows"], results["reference"]
    strengths = sorted({row["guidance"] for row in rows})
    given = {"preset": [options.preset], "num": [options.num], "seed": [options.seed], "precision": [options.precision]}
    given |= {key: getattr(options, key) for key in ("guidance", "fixed_guidance", "teacher_steps")}
    given["updates"] = options.updates or UPDATES[options.preset]
    command = " ".join(f"--{key.replace('_', '-')} " + " ".join(map(str, values)) for key, values in given.items())
    lines = [
        f"# {options.preset}: every method on one teacher", "",
        f"Made by `python -m fastdiff.compare {command}`.", "",
        f"Samples: {options.num} a cell. FD: Fréchet distance on features of {reference['extractor']}, not FID; one "
        f"half of the real images against the other has {reference['half_against_half_fd']:.2f}. Score: exp of the "
        f"mean KL of the predicted classes to their marginal; real images have {reference['score']:.2f}. D: "
        "deterministic, S: stochastic. Calls: network calls an image at w > 0.", "",
    ]  # fmt: skip
    for title, key, digits in (("FD", "fd", 2), ("Score", "score", 2), ("Images per second", "images_per_second", 0)):
        columns = " | ".join(f"w = {w:g}" for w in strengths)
        lines += [f"## {title}", "", f"| method | D/S | steps | calls | {columns} |"]
        lines += ["|---|---|---:|---:|" + "---:|" * len(strengths)]
        for name, steps in dict.fromkeys((row["model"], row["steps"]) for row in sorted(rows, key=_order)):
            found = [find(rows, name, steps, w) for w in strengths]
            some = [row for row in found if row is not None]
            cells = ["" if row is None else f"{row[key]:.{digits}f}" for row in found]
            calls = max(row["nfe"] for row in some)
            lines.append(f"| {name} | {some[0]['letter']} | {steps} | {calls:g} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["## Reconstruction", "", "Test images encoded and decoded as their own class; root mean squared error."]
    drawn = sorted(options.guidance)
    lines += ["", "| pair | " + " | ".join(f"w = {w:g}: calls | error" for w in drawn) + " |"]
    lines += ["|---|" + "---:|---:|" * len(drawn)]
    table: dict[str, list[str]] = {}
    for row in sorted(results["reconstruction"], key=lambda row: row["guidance"]):
        table.setdefault(row["pair"], []).append(f"{row['calls']} | {row['rmse']:.4f}")
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in table.items()]
    pictures = [f"![samples at w = {w:g}](samples-w{w:g}.png)" for w in drawn]
    lines += ["", "## Figures", "", "![quality against steps](quality-vs-steps.png)", ""]
    lines += ["![trade-off](trade-off.png)", ""]
    return "\n".join(lines + pictures) + "\n"


def _order(row: dict) -> tuple:
    return row["model"], -row["steps"]


def draw(results: dict, options: Options, reference: Reference) -> None:
    """The figures: FD and score against steps for each w, FD against score over w, and samples for each w."""
    figures.plot_methods(results["rows"], reference.floor, options.out / "quality-vs-steps.png")
    figures.plot_trade_off(results["rows"], options.out / "trade-off.png")
    shown = [("guided teacher, DDIM", max(options.teacher_steps))]
    shown += [(name, steps) for name in ("stage 1 and 2", "stage 1 and 2, stochastic") for steps in (8, 4, 1)]
    by_name = {(method.name, method.steps): method for method in methods(options)}
    classes, columns = reference.dataset.num_classes, 5
    for w in options.guidance:
        panels = []
        for name, steps in shown:
            method = by_name[name, steps]
            images = generate(
                with_guidance(checkpoint.load(method.checkpoint, device=options.device)), num=classes * columns,
                labels=torch.arange(classes).repeat_interleave(columns), guidance=w, steps=steps,
                noise_ids=torch.arange(columns).repeat(classes), sampler=method.sampler, seed=options.seed,
            )  # fmt: skip
            panels.append((f"{name}, {steps}", torch.cat([part.cpu() for part in images])))
        figures.save_panels(panels, options.out / f"samples-w{w:g}.png", columns=columns)


if __name__ == "__main__":
    cli.run(main, Options)
