"""Every method of [GD], and SiD, on one teacher, in tables: `python -m train.compare --preset digits`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from fastdiff import checkpoint, checks, cli, data, figures, files, lock
from fastdiff.cli import number
from fastdiff.denoiser import MAX_GUIDANCE, is_guidance, with_guidance
from fastdiff.errors import UserError
from fastdiff.evaluate import Reference
from fastdiff.metrics import Row
from fastdiff.networks import NetworkOptions, enter
from fastdiff.precision import Precision
from fastdiff.translate import Pair, rmse
from train import encoder, sid, stage1, stage2, teacher, two_student
from train.options import LoopOptions
from train.report import page, pictures, timing
from train.report.methods import NAMES, Method, MethodName, find
from train.report.tables import SLOW_STEPS, report

STUDENT_STEPS = (16, 8, 4, 2, 1)
ENCODER_STEPS = 8
RECONSTRUCTED = 256  # images
LAST_ROUNDS = 3  # how many times as long the rounds with 2 steps and with 1 are
UPDATES = {"digits": (10_000, 9000, 400), "fashion-mnist": (8000, 6000, 1000)}  # teacher, stage 1, a round
BATCH_SIZE = 128
START_STEPS = 64  # of the model that stage 2 starts with
TIMED_ROUNDS = 5  # of all rows but the slow ones


@dataclass(frozen=True, kw_only=True)
class Options(NetworkOptions):
    preset: Literal["digits", "fashion-mnist"] = "digits"
    out: Path = Path("runs/compare")
    """Runs, tables and figures; running again into the same folder continues what is there."""
    methods: tuple[MethodName, ...] = get_args(MethodName)
    """What is trained and scored (with what it is distilled from): the guided teacher with DDIM and with DDPM's
    sampler (ancestral); stage 1 alone; deterministic and stochastic students; students for one fixed w; two students
    without w inside; a SiD generator; an encoder, for reconstruction. Others can be added to the same folder later."""
    guidance: tuple[float, ...] = (0.0, 0.3, 1.0, 2.0, 4.0)
    """The columns of the tables."""
    fixed_guidance: tuple[float, ...] = (1.0,)
    """w of the methods fixed and two-student."""
    teacher_steps: tuple[int, ...] = (1024, 256, 64, 16, 8, 4, 2, 1)
    num: int = 1024
    """Samples a score."""
    network: str = "unet"
    """Which of fastdiff.denoiser.NETWORKS the teacher is."""
    updates: tuple[int, int, int] | None = None
    """Updates of the teacher, of stage 1, and of a round of stage 2; default: the preset's."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    precision: Precision = "fp32"
    """auto: bf16 where it is found to be faster and within 2e-2 of fp32, for all of the runs alike."""
    compile: bool = False
    """torch.compile the networks that train, and those that they learn from."""
    seed: int = 0


def main(options: Options) -> None:
    """Train every method of the paper on one teacher, score and time all, and write tables and figures."""
    check(options)
    enter(options.network_module)
    checks.folder(options.out)
    with lock.held(options.out):
        compare(options)


def compare(options: Options) -> None:
    """What `main` does, in a folder of which this process is sure."""
    options = settled(options)
    results = load_results(options)
    reference = Reference.load(options.preset, device=options.device)
    results["reference"] = reference.describe()
    train_all(options)
    for method in methods(options):
        score(method, options, reference, results)
    if "encoder" in options.methods:
        results["reconstruction"] = reconstruction(options)
        save_results(options, results)
    draw(results, options, reference)
    save_report(options, results)
    results["timing"] = time_all(options, results["rows"])
    save_report(options, results)
    page.write(options.out / page.NAME, [options.out])
    print(f"done: {options.out / 'report.md'}, and to look at: {options.out / page.NAME}")


def check(options: Options) -> None:
    """Raises UserError for options that make no sense."""
    checks.device(options.device)
    if options.num < 2:
        raise UserError(f"--num {options.num}: a score needs at least 2 images")
    if not all(map(is_guidance, (*options.guidance, *options.fixed_guidance))):
        raise UserError(f"--guidance and --fixed-guidance must be numbers ≥ 0 and at most {MAX_GUIDANCE:g}")
    if not options.methods:
        raise UserError(f"--methods needs at least one of {', '.join(get_args(MethodName))}")
    if not options.guidance or not options.teacher_steps or min(options.teacher_steps) < 1:
        raise UserError("--guidance and --teacher-steps need at least one value, and steps must be positive")
    if options.updates is not None and min(options.updates) < 1:
        raise UserError(f"--updates must be three positive numbers, got {options.updates}")


def settled(options: Options) -> Options:
    """With the precision of the teacher's run for all of them."""
    common = {
        "network": options.network,
        "out": options.out / "teacher",
        "device": options.device,
        "precision": options.precision,
    }
    recipe = teacher.Options(**(teacher.PRESETS[options.preset] | common))
    return replace(options, precision=teacher.settled_precision(recipe))


def train_all(options: Options) -> None:
    """Run, continue or reuse the recipes of the methods asked for, and of those that they are distilled from."""
    first, second, each = options.updates or UPDATES[options.preset]
    run, at, asked = _recipe(options), options.out, set(options.methods)
    halving = {
        "start_steps": START_STEPS,
        "updates": each,
        "last_updates": LAST_ROUNDS * each,
        "save_every": LAST_ROUNDS * each,
    }
    teacher.train(run(teacher, "teacher", updates=first, network=options.network))
    if asked & {"stage1", "deterministic", "stochastic", "sid", "encoder"}:
        limits = 0.0, max(4.0, *options.guidance)
        stage1.train(run(stage1, "stage1", updates=second, teacher=at / "teacher", guidance_range=limits))
    if asked & {"deterministic", "encoder"}:  # the encoder's decoder
        stage2.train(run(stage2, "stage2", teacher=at / "stage1", **halving))
    if "stochastic" in asked:
        stage2.train(run(stage2, "stochastic", teacher=at / "stage1", sampler="stochastic", **halving))
    for w in options.fixed_guidance:
        if "fixed" in asked:
            fixed = f"fixed-w{number(w)}"
            stage1.train(run(stage1, f"{fixed}-stage1", updates=second, teacher=at / "teacher", guidance_range=(w, w)))
            stage2.train(run(stage2, fixed, teacher=at / f"{fixed}-stage1", **halving))
        if "two-student" in asked:
            stage_two = run(two_student, f"two-student-w{number(w)}", teacher=at / "teacher", guidance=w, **halving)
            two_student.train(stage_two)
    if "sid" in asked:
        longest = LAST_ROUNDS * each
        sid.train(
            run(sid, "sid", teacher=at / "stage1", updates=longest, save_every=longest, score_num=min(options.num, 256))
        )
    if "encoder" in asked:
        encoder.train(run(encoder, "encoder", teacher=at / "stage1", end_steps=ENCODER_STEPS, **halving))


def _recipe(options: Options):
    """(module, folder, options) -> the recipe's options with the preset's settings, to start or to continue."""

    def build(module, name: str, **changes) -> LoopOptions:
        out = options.out / name
        common = {
            key: getattr(options, key) for key in ("preset", "device", "precision", "compile", "seed", "network_module")
        }
        settings = module.PRESETS[options.preset] | common | {"batch_size": BATCH_SIZE}
        settings |= {"out": out, "resume": out.exists()} | changes
        print(f"{name}: {settings['updates']} updates", flush=True)
        return module.Options(**settings)

    return build


def methods(options: Options) -> list[Method]:
    """The lines of the tables that were asked for, cheapest first, so that an interrupted run has most of them."""
    return [method for method in _all_methods(options) if method.key in options.methods]


def _all_methods(options: Options) -> Iterator[Method]:
    at, every = options.out, options.guidance

    def line(key: str, letter: str, checkpoint: str, sampler: str, steps: int, guidance=every) -> Method:
        name = NAMES[key].format(w=number(guidance[0]))
        return Method(key, name, letter, at / checkpoint, sampler, steps, guidance)

    for steps in reversed(STUDENT_STEPS):
        yield line("deterministic", "D", f"stage2/steps-{steps}", "ddim", steps)
        yield line("stochastic", "S", f"stochastic/steps-{steps}", "stochastic", steps)
        yield line("stage1", "D", "stage1", "ddim", steps)
        for w in options.fixed_guidance:
            yield line("fixed", "D", f"fixed-w{number(w)}/steps-{steps}", "ddim", steps, (w,))
            yield line("two-student", "D", f"two-student-w{number(w)}/steps-{steps}", "ddim", steps, (w,))
    yield line("sid", "D", "sid", "one_step", 1)
    for steps in sorted(options.teacher_steps):
        yield line("teacher", "D", "teacher", "ddim", steps)
        yield line("ancestral", "S", "teacher", "ancestral", steps)


def score(method: Method, options: Options, reference: Reference, results: dict) -> None:
    """Add the rows of a method that `results` does not have, and save after each."""
    model = None
    for w in method.guidance:
        if find(results["rows"], method.name, method.steps, w) is not None:
            continue
        model = model or method.load(options)
        row = asdict(method.score(model, w, options, reference))
        results["rows"].append(row | {"letter": method.letter})
        save_results(options, results)
        print(json.dumps(row), flush=True)


def reconstruction(options: Options) -> list[dict]:
    """A -> A through the distilled encoder and decoder, and by DDIM with as many and with twice as many calls.

    DDIM's error is the smaller one of those with and without a limit on x̂, which strong guidance decides differently.
    """
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
            error = min(
                rmse(pair.translate(images, labels, labels, w, clip=clip, precision=options.precision), images)
                for clip in ((True, False) if pair is not distilled else (False,))
            )
            rows.append({"pair": name, "guidance": w, "calls": pair.calls(w), "rmse": round(error, 5)})
    return rows


def time_all(options: Options, rows: list[dict]) -> dict:
    """Wall-clock of one batch for every row asked for, at w = 0 and at its smallest other w. rows: as scored."""
    timed = [(method, w) for method in methods(options) for w in _timed_strengths(method.guidance)]
    slow = [one for one in timed if one[0].steps >= SLOW_STEPS]
    fast = [one for one in timed if one[0].steps < SLOW_STEPS]
    print(f"timing: {len(fast)} rows {TIMED_ROUNDS} times, {len(slow)} slow ones once", flush=True)
    times = timing.rounds(fast, slow, options, count=TIMED_ROUNDS)
    described = []
    for method, w in timed:
        row, taken = find(rows, method.name, method.steps, w), times[method, w]
        described.append({key: row[key] for key in ("model", "letter", "steps", "nfe", "guidance")})
        described[-1] |= {"times": len(taken), "seconds": float(f"{statistics.median(taken):.4g}")}
    rounds = [round(sum(times[one][i] for one in fast), 3) for i in range(TIMED_ROUNDS)]
    where = {"device": options.device, "threads": torch.get_num_threads()}
    return {"batch": timing.BATCH, **where, "rounds": rounds, "rows": described}


def _timed_strengths(guidance: tuple[float, ...]) -> list[float]:
    """Time depends on whether there is guidance, not on how much."""
    return sorted({0.0} & {*guidance}) + sorted(w for w in guidance if w)[:1]


def load_results(options: Options) -> dict:
    """What an earlier run into the same folder has scored. Raises UserError where it had other options."""
    path = options.out / "results.json"
    now = {key: getattr(options, key) for key in ("preset", "num", "seed", "precision")}
    if options.network != "unet":
        now["network"] = options.network
    now["updates"] = list(options.updates or UPDATES[options.preset])
    if not path.is_file():
        return {"options": now, "rows": []}
    try:
        results = json.loads(path.read_text())
        before, _ = results["options"], results["rows"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no result of train.compare: move it away, or choose another --out") from None
    if before != now:
        raise UserError(f"{path} was made with {before}, and this run has {now}: choose another --out")
    return results


def save_results(options: Options, results: dict) -> None:
    files.replace(options.out / "results.json", json.dumps(results, indent=1) + "\n")


def save_report(options: Options, results: dict) -> None:
    save_results(options, results)
    files.replace(options.out / "report.md", report(results, options.out))


def draw(results: dict, options: Options, reference: Reference) -> None:
    """The figures: FD and score against steps for each w, FD against score over w, and samples for each w."""
    if results["rows"]:
        rows = [Row(**{key: value for key, value in row.items() if key != "letter"}) for row in results["rows"]]
        figures.plot_methods(rows, reference.floor, options.out / "quality-vs-steps.png")
        figures.plot_trade_off(rows, options.out / "trade-off.png")
    drawn = pictures.draw(methods(options), options, options.out, reference.dataset.class_names)
    earlier = results.get("pictures", {}).get("grids", {})  # of methods that this run was not asked for
    results["pictures"] = drawn | {"grids": earlier | drawn["grids"]}
    wanted = [("teacher", max(options.teacher_steps))]
    wanted += [(key, steps) for key in ("deterministic", "stochastic") for steps in (8, 4, 1)]
    wanted.append(("sid", 1))
    asked = {(method.key, method.steps): method for method in methods(options)}
    shown = [asked[key] for key in wanted if key in asked]
    for w in options.guidance if shown else ():
        titles = {f"{one.name}, {one.steps}": one for one in shown}
        panels = pictures.panels(titles, w, options.out, drawn)
        figures.save_panels(panels, options.out / f"samples-w{number(w)}.png", columns=pictures.NOISES)


if __name__ == "__main__":
    cli.run(main, Options)
