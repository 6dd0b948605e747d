"""How all command lines start, and how they end."""

from __future__ import annotations

import errno
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import make_dataclass
from typing import Any, get_type_hints

import tyro

from fastdiff import distributed, memory
from fastdiff.errors import UserError
from kernels import BackendError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


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
        given = tyro.cli(options, description=(function.__doc__ or "").partition("\n")[0])
        distributed.start()
        if getattr(given, "device", None) == "cpu":
            memory.keep_freed()
        function(given)
    except (UserError, BackendError) as error:
        if distributed.is_first():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        where = error.filename or "a file"
        print(
            f"error: {where} was not written ({error.strerror}): make room there, or choose another drive",
            file=sys.stderr,
        )
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
    changed = [(key, known[key], value) for key, value in values.items()]
    kept = {"__module__": options.__module__}
    return make_dataclass(options.__name__, changed, bases=(options,), frozen=True, kw_only=True, namespace=kept)


def _preset_name(arguments: list[str]) -> str | None:
    for here, following in itertools.pairwise([*arguments, ""]):
        if here == "--preset":
            return following
        if here.startswith("--preset="):
            return here.partition("=")[2]
    return None


def flags(options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, prefix: str = "") -> Iterator[str]:
    """Options as one would type them, those that differ from the defaults, if there are any."""
    defaults = defaults or {}
    for key, value in options.items():
        name = key.replace("_", "-")
        if isinstance(value, dict):
            yield from flags(value, defaults.get(key), f"{prefix}{name}.")
        elif key not in defaults or value != defaults[key]:
            yield from _flag(prefix + name, value)


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        prefix, _, last = name.rpartition(".")
        return [f"--{name}" if value else f"--{prefix}{'.' * bool(prefix)}no-{last}"]
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
