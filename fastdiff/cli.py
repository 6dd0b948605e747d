"""The `fastdiff` command (each subcommand is a module's own command line), and how all command lines start."""

from __future__ import annotations

import itertools
import runpy
import sys
from collections.abc import Callable, Mapping
from dataclasses import make_dataclass
from typing import Any, get_type_hints

import tyro

from fastdiff import distributed, memory
from fastdiff.errors import UserError
from kernels import BackendError

COMMANDS = {
    "demo": ("train.demo", "the whole pipeline on the embedded data set"),
    "teacher": ("train.teacher", "train a class-conditional teacher with label dropping"),
    "stage1": ("train.stage1", "distil guidance into one network that takes w"),
    "stage2": ("train.stage2", "halve the number of steps again and again"),
    "sid": ("train.sid", "a one-step generator from a teacher alone"),
    "encoder": ("train.encoder", "distil DDIM's way from image to noise"),
    "two_student": ("train.two_student", "the baseline that distils without guidance inside"),
    "sample": ("fastdiff.sample", "draw images from a checkpoint"),
    "translate": ("fastdiff.translate", "turn pictures of one class into another"),
    "compare": ("fastdiff.compare", "every method of the paper on one teacher, in tables and figures"),
    "evaluate": ("fastdiff.evaluate", "score a checkpoint: Fréchet distance, score, images per second"),
    "status": ("fastdiff.status", "where runs are, and the command that continues them"),
    "plot": ("fastdiff.plot", "the curves of runs in one picture"),
}


def main() -> None:
    """Entry point of `fastdiff COMMAND …`."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: fastdiff COMMAND [OPTIONS]    (fastdiff COMMAND --help lists the options)\n")
        print("\n".join(f"  {name:10} {text}" for name, (_, text) in COMMANDS.items()))
        sys.exit(0 if len(sys.argv) >= 2 else 2)
    name = sys.argv.pop(1)
    if name not in COMMANDS:
        print(f"fastdiff: unknown command {name!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)


def number(value: float) -> str:
    """As one would type it: 1 for 1.0, and as many digits as it takes to read the same number again."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def run(function: Callable[[Any], None], options: type, presets: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Parse the command line into the dataclass `options` and call `function` with it.

    presets: by name, the defaults that `--preset NAME` changes; all other options override them. A UserError ends the
    process with its one sentence and exit code 2.
    """
    try:
        name = _preset_name(sys.argv[1:])
        if presets is not None and name is not None:
            if name not in presets:
                raise UserError(f"unknown preset {name!r}; known: {', '.join(presets)}")
            options = _with_defaults(options, {"preset": name, **presets[name]})
        given = tyro.cli(options, description=function.__doc__)
        distributed.start()
        if getattr(given, "device", None) == "cpu":
            memory.keep_freed()
        function(given)
    except (UserError, BackendError) as error:
        if distributed.is_first():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if distributed.world_size() > 1:
            print(f"process {distributed.rank()} failed: {error}", file=sys.stderr, flush=True)
        raise
    finally:
        distributed.stop()


def _with_defaults(options: type, values: Mapping[str, Any]) -> type:
    """A subclass with other defaults, so that required options stay required and --help tells the preset's values."""
    known = get_type_hints(options, include_extras=True)  # their names need not be known where the subclass is
    return make_dataclass(
        options.__name__, [(key, known[key], value) for key, value in values.items()],
        bases=(options,), frozen=True, kw_only=True, namespace={"__module__": options.__module__},
    )  # fmt: skip


def _preset_name(arguments: list[str]) -> str | None:
    for here, following in itertools.pairwise([*arguments, ""]):
        if here == "--preset":
            return following
        if here.startswith("--preset="):
            return here.partition("=")[2]
    return None
