"""A network of the user's own by option: `--network-module mine.py`, a file that enters builders in `NETWORKS`.

It is the only code of the user's that fastdiff runs, and only where the option names it: no checkpoint and no run's
folder can have it run.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from fastdiff import denoiser
from fastdiff.errors import UserError

_entered: set[Path] = set()


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """What every command that builds models has."""

    network_module: Path | None = None
    """A Python file of yours that enters a network in fastdiff.denoiser.NETWORKS. It is run as it stands."""


def enter(module: Path | None) -> None:
    """Run a file that enters networks, once; None does nothing. What lies beside it can be imported by it.

    Raises UserError where there is no such file, where it fails, and where it enters nothing or in place of a network
    that is there.
    """
    if module is None or module.resolve() in _entered:
        return
    option = f"--network-module {module}"
    if not module.is_file():
        raise UserError(f"{option}: there is no such file; name the Python file that enters your network")
    networks = denoiser.NETWORKS
    before = dict(networks)
    try:
        _run(module)
        _check(before, option)
    except BaseException as error:
        networks.clear()
        networks.update(before)
        if isinstance(error, (UserError, KeyboardInterrupt)):
            raise
        raise UserError(f"{option} failed {_where(error, module)}: mend it, and try again") from None
    _entered.add(module.resolve())


def _check(before: dict, option: str) -> None:
    """Raises UserError unless networks came in, each under a name of its own."""
    now = denoiser.NETWORKS
    replaced = [name for name in before if now.get(name) is not before[name]]
    if replaced or len(now) == len(before):
        wrong = f"replaces the network {replaced[0]!r}" if replaced else "enters no network"
        raise UserError(f'{option} {wrong}: let it say fastdiff.denoiser.NETWORKS["its own name"] = what builds it')


def _run(module: Path) -> None:
    name = f"network_module_{module.stem}"
    spec = importlib.util.spec_from_file_location(name, module)
    if spec is None:
        raise ImportError("its name does not end in .py")
    if str(module.resolve().parent) not in sys.path:
        sys.path.append(str(module.resolve().parent))
    sys.modules[name] = made = importlib.util.module_from_spec(spec)  # where its own classes look for it
    try:
        spec.loader.exec_module(made)
    except BaseException:
        del sys.modules[name]
        raise


def _where(error: BaseException, module: Path) -> str:
    """What went wrong, in a line, and in which one of the file."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == module.resolve()]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
    reason = " ".join(str(error).split())[:200]
    return f"in line {line} ({type(error).__name__}: {reason})" if line else f"({type(error).__name__}: {reason})"
