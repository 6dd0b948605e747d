"""Reports in Markdown: the tables of a comparison, its headline, and what the demo tells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from fastdiff import metrics
from fastdiff.cli import number
from fastdiff.evaluate import table
from train.report.methods import DEMO_NAMES, NAMES, find

SLOW_STEPS = 256  # lines with as many or more are timed once
WITHIN = 1.1  # of the teacher's FD, for the headline


class DemoOptions(Protocol):
    preset: str
    minutes: float
    num: int
    seed: int
    precision: str


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
    nearest: the row of the student with the least FD, or None where there is no student. calls, seconds: the teacher's
    over the student's, or None.
    """
    rows = results["rows"]
    teachers = [row for row in rows if row["model"] in _called("teacher")]
    students = [row for row in rows if row["model"] in _called("deterministic", "stochastic", "sid")]
    most, lines = max((row["steps"] for row in teachers), default=None), []
    for best in sorted((row for row in teachers if row["steps"] == most), key=lambda row: row["guidance"]):
        w = best["guidance"]
        here = [row for row in students if row["guidance"] == w]
        good = [row for row in here if row["fd"] <= WITHIN * best["fd"]]
        student = min(good, key=lambda row: (row["steps"], row["fd"]), default=None)
        nearest = min(here, key=lambda row: row["fd"], default=None)
        line = {"guidance": w, "teacher": best, "student": student, "nearest": nearest, "calls": None, "seconds": None}
        if student is not None:
            slow, fast = (_seconds(results, row["model"], row["steps"], w > 0) for row in (best, student))
            line |= {"calls": best["nfe"] / student["nfe"], "seconds": slow / fast if slow and fast else None}
        lines.append(line)
    return lines


def _called(*keys: str) -> list[str]:
    """What tables call these methods."""
    return [names[key] for names in (NAMES, DEMO_NAMES) for key in keys if key in names]


def sentence(line: dict) -> str:
    """A line of `headline` in words."""
    teacher, student = line["teacher"], line["student"] or line["nearest"]
    at = f"At w = {number(line['guidance'])}, "
    slow = f"the guided teacher with {_calls(teacher)} ({teacher['fd']:.2f})"
    if student is None:
        return f"{at}there is no student to compare with {slow}."
    fast = f"{student['model']} with {_calls(student)}"
    distance = f"(Fréchet distance {student['fd']:.2f})"
    if line["student"] is None:
        return f"{at}no student is as near to the real images as {slow}; the nearest is {fast} {distance}."
    speed = f", {_number(line['seconds'])} times as fast" if line["seconds"] else ""
    return f"{at}{fast} is as near to the real images {distance} as {slow}: {line['calls']:g} times fewer calls{speed}."


def _calls(row: dict) -> str:
    return f"{row['nfe']:g} network call{'s' * (row['nfe'] != 1)} an image"


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


def demo_command(options: DemoOptions) -> str:
    return (
        f"python -m train.demo --preset {options.preset} --minutes {options.minutes:g} --num {options.num} "
        f"--seed {options.seed} --precision {options.precision}"
    )


def demo_report(results: dict, options: DemoOptions, strengths: tuple[float, ...]) -> str:
    """report.md: the table, the figures that matter, and how to make it again."""
    rows, timing = [metrics.Row(**row) for row in results["rows"]], results["timing"]
    training = sum(run["seconds"] for run in results["training"])

    def fd(model: str, steps: int, w: float) -> float:
        return metrics.find(rows, model, steps, w).fd

    lines = [
        f"# {options.preset}: a guided teacher and its few-step students",
        "",
        f"Made by `{demo_command(options)}`.",
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
        + " | ".join(f"w = {w:g}" for w in strengths)
        + " |",
        "|---|" + "---:|" * len(strengths),
    ]
    best = rows[0].model, rows[0].steps
    for model, steps in list(dict.fromkeys((row.model, row.steps) for row in rows))[1:]:
        cells = (f"{fd(model, steps, w) / fd(*best, w):.2f}" for w in strengths)
        lines.append(f"| {with_steps(model, steps)} | " + " | ".join(cells) + " |")
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


def with_steps(name: str, steps: int) -> str:
    return f"{name}, {steps} step{'s' * (steps > 1)}"
