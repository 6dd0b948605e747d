"""Every method of [GD], and SiD, on one teacher, in tables: `python -m train.compare --preset digits`."""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch

from fastdiff import checkpoint, checks, cli, data, figures
from fastdiff.cli import number
from fastdiff.denoiser import MAX_GUIDANCE, is_guidance, with_guidance
from fastdiff.errors import UserError
from fastdiff.evaluate import Reference, evaluate
from fastdiff.generate import Sampling, generate
from fastdiff.metrics import Row
from fastdiff.precision import Precision
from fastdiff.translate import Pair, rmse
from train import encoder, loop, sid, stage1, stage2, teacher, two_student

MethodName = Literal[
    "teacher", "ancestral", "stage1", "deterministic", "stochastic", "fixed", "two-student", "sid", "encoder"
]
NAMES = {  # of the tables' rows; those with a w of their own are scored at that w alone
    "teacher": "guided teacher, DDIM",
    "ancestral": "guided teacher, ancestral",
    "stage1": "stage 1 alone",
    "deterministic": "stage 1 and 2",
    "stochastic": "stage 1 and 2, stochastic",
    "fixed": "fixed w = {w}",
    "two-student": "two students, w = {w}",
    "sid": "SiD",
}
STUDENT_STEPS = (16, 8, 4, 2, 1)
ENCODER_STEPS = 8
RECONSTRUCTED = 256  # images
LAST_ROUNDS = 3  # how many times as long the rounds with 2 steps and with 1 are
UPDATES = {"digits": (10_000, 9000, 400), "fashion-mnist": (8000, 6000, 1000)}  # teacher, stage 1, a round
BATCH_SIZE = 128
START_STEPS = 64  # of the model that stage 2 starts with
TIMED_BATCH = 128
TIMED_ROUNDS = 5  # of all rows but the slow ones
SLOW_STEPS = 256  # rows with as many or more are timed once
WITHIN = 1.1  # of the teacher's FD, for the headline


@dataclass(frozen=True, kw_only=True)
class Options:
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
    updates: tuple[int, int, int] | None = None
    """Updates of the teacher, of stage 1, and of a round of stage 2; default: the preset's."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    precision: Precision = "fp32"
    """auto: bf16 where it is found to be faster and within 2e-2 of fp32, for all of the runs alike."""
    seed: int = 0


class Method(NamedTuple):
    """One line of the tables: a model with a sampler and a number of steps, scored at some w."""

    key: MethodName
    name: str
    letter: str
    """D for a deterministic sampler, S for a stochastic one, as in the paper's tables."""
    checkpoint: Path
    sampler: str
    steps: int
    guidance: tuple[float, ...]

    def sampling(self, w: float, options: Options) -> Sampling:
        how = {"seed": options.seed, "precision": options.precision}
        return Sampling(guidance=w, steps=self.steps, sampler=self.sampler, **how)


def main(options: Options) -> None:
    """Train every method of the paper on one teacher, score and time all, and write tables and figures."""
    check(options)
    checks.folder(options.out)
    reference = Reference.load(options.preset, device=options.device)
    options = settled(options)
    results = load_results(options)
    results["reference"] = reference.describe()
    train_all(options)
    for method in methods(options):
        score(method, options, reference, results)
    if "encoder" in options.methods:
        results["reconstruction"] = reconstruction(options)
    draw(results, options, reference)
    save_report(options, results)
    results["timing"] = time_all(options, results["rows"])
    save_report(options, results)
    print(f"done: {options.out / 'report.md'}")


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
    common = {"out": options.out / "teacher", "device": options.device, "precision": options.precision}
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
    teacher.train(run(teacher, "teacher", updates=first))
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

    def build(module, name: str, **changes) -> loop.LoopOptions:
        out = options.out / name
        common = {key: getattr(options, key) for key in ("preset", "device", "precision", "seed")}
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
        model = model or with_guidance(checkpoint.load(method.checkpoint, device=options.device))
        row = asdict(evaluate(model, reference, method.sampling(w, options), name=method.name, num=options.num))
        results["rows"].append(row | {"letter": method.letter})
        save_results(options, results)
        print(json.dumps(row), flush=True)


def find(rows: list[dict], name: str, steps: int, w: float) -> dict | None:
    """The row of a method at a number of steps and a strength."""
    return next((row for row in rows if (row["model"], row["steps"], row["guidance"]) == (name, steps, w)), None)


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
    """Wall-clock of one batch for every row asked for, all in one run, so that the times can be compared.

    rows: as scored. Rounds of all rows but the slow ones; these are timed once, in turn between the rounds, so that a
    change of the machine's speed shows on both sides. Each row is timed at w = 0 and at its smallest other w.
    """
    model = functools.cache(lambda path: with_guidance(checkpoint.load(path, device=options.device)))

    def seconds(method: Method, w: float, steps: int) -> float:
        start = time.perf_counter()
        sampling = replace(method.sampling(w, options), steps=steps, batch_size=TIMED_BATCH)
        for images in generate(model(method.checkpoint), TIMED_BATCH, sampling):
            images.cpu()  # waits for the device
        return time.perf_counter() - start

    timed = [(method, w) for method in methods(options) for w in _timed_strengths(method.guidance)]
    slow = [one for one in timed if one[0].steps >= SLOW_STEPS]
    fast = [one for one in timed if one[0].steps < SLOW_STEPS]
    print(f"timing: {len(fast)} rows {TIMED_ROUNDS} times, {len(slow)} slow ones once", flush=True)
    for method, w in timed:
        seconds(method, w, min(2, method.steps))  # load, compile, warm up
    times: dict[tuple, list[float]] = {one: [] for one in timed}
    gaps = TIMED_ROUNDS - 1
    for i in range(TIMED_ROUNDS):
        for method, w in [*fast, *(slow[i::gaps] if i < gaps else [])]:
            times[method, w].append(seconds(method, w, method.steps))
    described = []
    for (method, w), taken in times.items():
        row = find(rows, method.name, method.steps, w)
        described.append({key: row[key] for key in ("model", "letter", "steps", "nfe", "guidance")})
        described[-1] |= {"times": len(taken), "seconds": float(f"{statistics.median(taken):.4g}")}
    rounds = [round(sum(times[one][i] for one in fast), 3) for i in range(TIMED_ROUNDS)]
    where = {"device": options.device, "threads": torch.get_num_threads()}
    return {"batch": TIMED_BATCH, **where, "rounds": rounds, "rows": described}


def _timed_strengths(guidance: tuple[float, ...]) -> list[float]:
    """Time depends on whether there is guidance, not on how much."""
    return sorted({0.0} & {*guidance}) + sorted(w for w in guidance if w)[:1]


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
        raise UserError(f"{path} is no result of train.compare: move it away, or choose another --out") from None
    if before != now:
        raise UserError(f"{path} was made with {before}, and this run has {now}: choose another --out")
    return results


def save_results(options: Options, results: dict) -> None:
    beside = options.out / "results.json.writing"
    beside.write_text(json.dumps(results, indent=1) + "\n")
    beside.replace(options.out / "results.json")


def save_report(options: Options, results: dict) -> None:
    save_results(options, results)
    (options.out / "report.md").write_text(report(results, options.out))


def report(results: dict, out: Path) -> str:
    """report.md: tables laid out as the paper's, rows method × steps with D or S, columns w; `out` has the pictures."""
    rows, reference, made = results["rows"], results["reference"], results["options"]
    lines = [
        f"# {made['preset']}: every method on one teacher",
        "",
        f"Made by `{command(results)}`.",
        "",
        f"Samples: {made['num']} a cell. FD: Fréchet distance on features of {reference['extractor']}, not FID; one "
        f"half of the real images against the other has {reference['half_against_half_fd']:.2f}. Score: exp of the "
        f"mean KL of the predicted classes to their marginal; real images have {reference['score']:.2f}. D: "
        "deterministic, S: stochastic. Calls: network calls an image at w > 0.",
        "",
        *_headline_table(results),
        *_quality_table(rows, "FD", "fd"),
        *_quality_table(rows, "Score", "score"),
        *_timing_table(results),
        *_reconstruction_table(results),
        "## Figures",
        "",
    ]
    names = {"quality-vs-steps.png": "quality against steps", "trade-off.png": "trade-off"}
    names |= {f"samples-w{number(w)}.png": f"samples at w = {number(w)}" for w in _strengths(rows)}
    pictures = [f"![{text}]({name})" for name, text in names.items() if (out / name).is_file()]
    return "\n".join(lines) + "\n\n".join(pictures) + "\n"


def command(results: dict) -> str:
    """The command that makes what `results` holds, which may have taken several."""
    rows, made = results["rows"], results["options"]
    of = {
        key: [row for row in rows if row["model"] == name.format(w=number(row["guidance"]))]
        for key, name in NAMES.items()
    }
    of["encoder"] = results.get("reconstruction", [])
    at_one = of["fixed"] + of["two-student"]
    at_all = [row for key, found in of.items() if key not in ("fixed", "two-student") for row in found]
    given = {key: [made[key]] for key in ("preset", "num", "seed", "precision")} | {
        "updates": made["updates"],
        "methods": [key for key, found in of.items() if found],
        "guidance": _strengths(at_all),
        "fixed-guidance": _strengths(at_one),
        "teacher-steps": sorted({row["steps"] for row in of["teacher"] + of["ancestral"]}, reverse=True),
    }
    values = {
        key: " ".join(number(value) if isinstance(value, float) else str(value) for value in some)
        for key, some in given.items()
    }
    return " ".join(["python -m train.compare", *(f"--{key} {text}" for key, text in values.items() if text)])


def headline(results: dict) -> list[dict]:
    """For each w, the guided teacher (DDIM, most steps) and the student with the fewest steps that is about as good.

    student: the row of a deterministic, stochastic or SiD student whose FD is at most WITHIN × the teacher's, or None.
    calls, seconds: the teacher's over the student's, or None.
    """
    rows = results["rows"]
    teachers = [row for row in rows if row["model"] == NAMES["teacher"]]
    students = [row for row in rows if row["model"] in (NAMES["deterministic"], NAMES["stochastic"], NAMES["sid"])]
    most, lines = max((row["steps"] for row in teachers), default=None), []
    for best in sorted((row for row in teachers if row["steps"] == most), key=lambda row: row["guidance"]):
        w = best["guidance"]
        good = [row for row in students if row["guidance"] == w and row["fd"] <= WITHIN * best["fd"]]
        student = min(good, key=lambda row: (row["steps"], row["fd"]), default=None)
        line = {"guidance": w, "teacher": best, "student": student, "calls": None, "seconds": None}
        if student is not None:
            slow, fast = (_seconds(results, row["model"], row["steps"], w > 0) for row in (best, student))
            line |= {"calls": best["nfe"] / student["nfe"], "seconds": slow / fast if slow and fast else None}
        lines.append(line)
    return lines


def _headline_table(results: dict) -> list[str]:
    found = headline(results)
    if not found:
        return []
    lines = [
        "## Headline",
        "",
        f"The guided teacher with {found[0]['teacher']['steps']} DDIM steps, and the student with the fewest steps "
        f"whose FD is at most {WITHIN:g} × the teacher's. ÷: the teacher's network calls, and its time (under "
        "Wall-clock), over the student's.",
        "",
        "| w | teacher's FD | score | student | steps | FD | score | calls ÷ | time ÷ |",
        "|---:|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for line in found:
        student = line["student"]
        cells = [number(line["guidance"]), *(f"{line['teacher'][key]:.2f}" for key in ("fd", "score"))]
        cells += [student["model"], str(student["steps"])] if student else ["none", ""]
        cells += [f"{student[key]:.2f}" if student else "" for key in ("fd", "score")]
        cells += [_number(line["calls"]), _number(line["seconds"])]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _quality_table(rows: list[dict], title: str, key: str) -> list[str]:
    strengths = _strengths(rows)
    columns = " | ".join(f"w = {number(w)}" for w in strengths)
    lines = [f"## {title}", "", f"| method | D/S | steps | calls | {columns} |"]
    lines += ["|---|---|---:|---:|" + "---:|" * len(strengths)]
    for name, steps, start in _lines(rows):
        found = [find(rows, name, steps, w) for w in strengths]
        lines.append(start + " | ".join("" if row is None else f"{row[key]:.2f}" for row in found) + " |")
    return [*lines, ""]


def _timing_table(results: dict) -> list[str]:
    """Images a second and the time of the guided teacher with most steps over the row's, at w > 0 and at w = 0."""
    timing = results.get("timing", {"rows": []})
    if not timing["rows"]:
        return []
    rows, rounds = timing["rows"], timing["rounds"]
    most = max((row["steps"] for row in rows if row["model"] == NAMES["teacher"]), default=None)
    lines = [
        "## Wall-clock",
        "",
        f"Batches of {timing['batch']}, all in one run on {timing['device']} with {timing['threads']} thread(s): "
        f"{len(rounds)} rounds of the rows with fewer than {SLOW_STEPS} steps (medians), the others once, between the "
        f"rounds. A round took {_number(min(rounds))} to {_number(max(rounds))} s: that is how even the machine was. "
        + (f"÷: the time of the guided teacher with {most} DDIM steps over the row's." if most else ""),
        "",
        "| method | D/S | steps | calls | images/s, w > 0 | ÷ | images/s, w = 0 | ÷ |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, steps, start in _lines(rows):
        cells = []
        for guided in (True, False):
            taken, slowest = (_seconds(results, *of, guided) for of in ((name, steps), (NAMES["teacher"], most)))
            cells += [_number(taken and timing["batch"] / taken), _number(taken and slowest and slowest / taken)]
        lines.append(start + " | ".join(cells) + " |")
    return [*lines, ""]


def _reconstruction_table(results: dict) -> list[str]:
    rows = sorted(results.get("reconstruction", []), key=lambda row: row["guidance"])
    if not rows:
        return []
    columns = [f"w = {number(w)}: calls | error" for w in _strengths(rows)]
    table: dict[str, list[str]] = {}
    for row in rows:
        table.setdefault(row["pair"], []).append(f"{row['calls']} | {row['rmse']:.4f}")
    lines = [
        "Test images encoded and decoded as their own class; root mean squared error, for DDIM with or without a "
        "limit on the predicted image, whichever is less.",
        "",
    ]
    lines += ["| pair | " + " | ".join(columns) + " |", "|---|" + "---:|---:|" * len(columns)]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in table.items()]
    return ["## Reconstruction", "", *lines, ""]


def _strengths(rows: list[dict]) -> list[float]:
    return sorted({row["guidance"] for row in rows})


def _lines(rows: list[dict]) -> Iterator[tuple[str, int, str]]:
    """Name, steps and the first cells of each line of a table."""
    for name, negative, letter in sorted({(row["model"], -row["steps"], row["letter"]) for row in rows}):
        steps = -negative  # the most first
        calls = max(row["nfe"] for row in rows if (row["model"], row["steps"]) == (name, steps))
        yield name, steps, f"| {name} | {letter} | {steps} | {calls:g} | "


def _seconds(results: dict, name: str, steps: int | None, guided: bool) -> float | None:
    """The time of a batch, where it was measured."""
    rows = results.get("timing", {}).get("rows", [])
    found = (row for row in rows if (row["model"], row["steps"], row["guidance"] > 0) == (name, steps, guided))
    return next((row["seconds"] for row in found), None)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.{2 if value < 10 else 0}f}"


def draw(results: dict, options: Options, reference: Reference) -> None:
    """The figures: FD and score against steps for each w, FD against score over w, and samples for each w."""
    if results["rows"]:
        rows = [Row(**{key: value for key, value in row.items() if key != "letter"}) for row in results["rows"]]
        figures.plot_methods(rows, reference.floor, options.out / "quality-vs-steps.png")
        figures.plot_trade_off(rows, options.out / "trade-off.png")
    wanted = [("teacher", max(options.teacher_steps))]
    wanted += [(key, steps) for key in ("deterministic", "stochastic") for steps in (8, 4, 1)]
    wanted.append(("sid", 1))
    asked = {(method.key, method.steps): method for method in methods(options)}
    shown = [asked[key] for key in wanted if key in asked]
    classes, columns = reference.dataset.num_classes, 5
    for w in options.guidance if shown else ():
        panels = []
        for method in shown:
            model = with_guidance(checkpoint.load(method.checkpoint, device=options.device))
            labels, ids = torch.arange(classes).repeat_interleave(columns), torch.arange(columns).repeat(classes)
            images = generate(model, labels, method.sampling(w, options), noise_ids=ids)
            panels.append((f"{method.name}, {method.steps}", torch.cat([part.cpu() for part in images])))
        figures.save_panels(panels, options.out / f"samples-w{number(w)}.png", columns=columns)


if __name__ == "__main__":
    cli.run(main, Options)
