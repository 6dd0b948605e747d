"""Random generators, saved so that a run goes on as if it had not been stopped.

Of ours dropout alone draws from them; a user's loss may. All else is drawn by sample.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import numpy
import torch
from torch import Tensor

from fastdiff import distributed


def seed(value: int) -> None:
    """This process's own: dropout differs between processes; the first keeps PyTorch's as it stands."""
    random.seed(value)
    numpy.random.seed(value % 2**32)
    if not distributed.is_first():
        torch.manual_seed(value % 2**63)


def _python_state() -> Tensor:
    _, words, normal = random.getstate()
    return torch.tensor([*words, normal is not None, normal or 0.0], dtype=torch.float64)


def _set_python_state(state: Tensor) -> None:
    *words, has_normal, normal = state.tolist()
    random.setstate((3, tuple(map(int, words)), normal if has_normal else None))


def _numpy_state() -> Tensor:
    _, words, *rest = numpy.random.get_state()
    return torch.tensor([*words.tolist(), *rest], dtype=torch.float64)


def _set_numpy_state(state: Tensor) -> None:
    *words, position, has_normal, normal = state.tolist()
    numpy.random.set_state(("MT19937", [*map(int, words)], int(position), int(has_normal), normal))


def _generators(device: torch.device) -> dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], None]]]:
    """How to get and set the state of each. Of ours dropout alone draws from them; a user's loss may."""
    generators = {
        "cpu": (torch.get_rng_state, torch.set_rng_state),
        "python": (_python_state, _set_python_state),
        "numpy": (_numpy_state, _set_numpy_state),
    }
    if device.type == "cuda":
        get, put = torch.cuda.get_rng_state, torch.cuda.set_rng_state
        generators["cuda"] = (functools.partial(get, device), functools.partial(put, device=device))
    return generators


def states(device: torch.device) -> dict[str, Tensor]:
    """Every process's generators."""
    states = {name: get() for name, (get, _) in _generators(device).items()}
    size = distributed.world_size()
    every = {name: distributed.gather(state[None], size) for name, state in states.items()}
    return {f"random/{name}/{rank}": state[rank] for name, state in every.items() for rank in range(size)}


def restore(tensors: dict[str, Tensor], device: torch.device) -> None:
    """This process's, if there was one of its number before."""
    for name, (_, put) in _generators(device).items():
        if (key := f"random/{name}/{distributed.rank()}") in tensors:
            put(tensors[key])
