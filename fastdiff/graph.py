"""CUDA graphs: all that a function launches on a GPU, recorded once and from then on started as one.

A GPU otherwise waits for Python, which launches a step's hundreds of kernels and an update's thousands one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor

from fastdiff import files
from fastdiff.denoiser import Denoiser
from fastdiff.errors import UserError

Choice = Literal["auto", "on", "off"]
T = TypeVar("T")


class NotRecordable(UserError):
    """What a function does cannot be recorded, or there is no memory for it."""


def wanted(choice: Choice, device: torch.device | str) -> bool:
    """Whether to record: auto does on CUDA devices."""
    return choice == "on" or (choice == "auto" and torch.device(device).type == "cuda")


class Recorder:
    """What needs CUDA: to run a function on a stream of its own, and to record it there. Raises ValueError without."""

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise ValueError(f"a CUDA graph needs a CUDA device, not {device}")
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], T]) -> T:
        """Call it on the stream, between what the current stream does before and after."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """(replay, output): replay() repeats what the function launches, on the current stream, and fills output.

        Recordings share memory: an output holds until the next replay of any. Raises NotRecordable.
        """
        graph, device = torch.cuda.CUDAGraph(), self.stream.device
        with torch.cuda.device(device):
            torch.cuda.empty_cache()  # the pool needs as much as what has just been run took, and that is free again
            numbers = torch.cuda.get_rng_state(device)
            try:
                # thread_local: what other threads do meanwhile, as NCCL's, is none of the recording's business
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    output = function()
            except Exception as error:  # CUDA's are of many kinds, and end in one that only says that it failed
                _renew_generator(device, numbers)
                raise NotRecordable(f"no CUDA graph: {_cause(error)}") from error
        return graph.replay, output


def _cause(error: BaseException) -> str:
    """The first line of what went wrong first."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory does not suffice for it"
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _renew_generator(device: torch.device, numbers: Tensor) -> None:
    """Give a device's random generator, which a failed recording leaves as if it still went on, a state of its own."""
    fresh = torch.Generator(device)
    fresh.set_state(numbers)
    torch.cuda.default_generators[device.index or 0].graphsafe_set_state(fresh.graphsafe_get_state())


def repeated(recorder: Recorder, function: Callable[[], T], warm_up: int = 1) -> Iterator[T]:
    """What a function returns, whenever the next one is asked for: at first by running it, then by replays.

    The first runs compile and choose what a recording must not. All tensors that it reads and writes have to stay where
    they lie. It knows nothing of who asks, lest a cycle of references keep a recording's memory until Python looks for
    cycles. Raises NotRecordable; nothing of that call has then been done.
    """
    for _ in range(warm_up):
        yield recorder.run(function)
    # Autocast must take no cast of a weight from outside into the recording, which would not repeat it, nor keep one
    # from inside, whose memory is the recording's.
    torch.clear_autocast_cache()
    try:
        replay, output = recorder.record(function)
    finally:
        torch.clear_autocast_cache()
    while True:
        replay()
        yield output


@dataclass
class _Loop:
    """A recording in the making: the tensors that it reads, its outputs, and how many network calls an image takes."""

    inputs: list[Tensor | None]
    outputs: Iterator[Tensor]
    calls: int = 0


class Captured:
    """sample(*inputs) -> (B, …) as a CUDA graph, for inputs that are (B, …) tensors on one device, or None.

    For each pattern of inputs that are None, the first call runs `sample` as it is, which compiles and chooses what a
    recording must not; the second one records it, and replays begin. All of them have as many rows as the very first
    call: fewer are filled up and cut off again, so that no row of the result may depend on other rows; more raise
    ValueError. Results are copies. Weights are read where they lay when it was recorded. A replay runs no Python:
    there are no callbacks, and network calls are added to `counter` as if they had been made by it.

    insists: raise NotRecordable where it cannot be recorded, instead of one warning, and `sample` as it is.
    """

    def __init__(self, sample: Callable[..., Tensor], counter: Denoiser, device: torch.device, *, insists: bool = True):
        self.sample, self.counter, self.recorder, self.insists = sample, counter, Recorder(device), insists
        self.rows, self.loops = 0, {}

    @torch.no_grad()
    def __call__(self, *inputs: Tensor | None) -> Tensor:
        count, pattern = len(inputs[0]), tuple(value is None for value in inputs)
        self.rows = self.rows or max(count, 1)
        if count > self.rows:
            raise ValueError(f"this graph is for batches of up to {self.rows} rows, as the first one; got {count}")
        try:
            return self._filled(count, pattern, inputs) if self.recorder else self.sample(*inputs)
        except NotRecordable as error:
            if self.insists:
                raise
            files.warn(f"sampling goes on without a graph: {error}")
            self.recorder, self.loops = None, {}
            return self.sample(*inputs)

    def _filled(self, count: int, pattern: tuple[bool, ...], inputs: tuple[Tensor | None, ...]) -> Tensor:
        if is_new := pattern not in self.loops:
            static = [value if value is None else value.new_zeros(self.rows, *value.shape[1:]) for value in inputs]
            self.loops[pattern] = _Loop(static, repeated(self.recorder, partial(self.sample, *static)))
        loop, before = self.loops[pattern], self.counter.network_rows
        for place, value in zip(loop.inputs, inputs, strict=True):
            if value is not None:
                place[:count] = value  # the rows beyond keep what they had
        result = next(loop.outputs)[:count].clone()
        if is_new:
            loop.calls = (self.counter.network_rows - before) // self.rows
        self.counter.network_rows = before + loop.calls * count
        return result
