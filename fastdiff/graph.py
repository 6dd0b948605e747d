"""CUDA graphs: all that a function launches on a GPU, recorded once and from then on started as one.

Sampling a small batch in a few steps otherwise waits for Python, which launches hundreds of kernels one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastdiff.denoiser import Denoiser


class Recorder:
    """What needs CUDA: to run a function on a stream of its own, and to record it there. Raises ValueError without."""

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise ValueError(f"a CUDA graph needs a CUDA device, not {device}")
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        """Call it on the stream, between what the current stream does before and after."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(replay, output): replay() repeats what the function launches, on the current stream, and fills output.

        Recordings share memory: an output holds until the next replay of any.
        """
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self.stream.device),
            # thread_local: what other threads do meanwhile, as NCCL's, is none of the recording's business
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            output = function()
        return graph.replay, output


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
    """

    def __init__(self, sample: Callable[..., Tensor], counter: Denoiser, device: torch.device):
        self.sample, self.counter, self.recorder = sample, counter, Recorder(device)
        self.rows, self.loops = 0, {}

    @torch.no_grad()
    def __call__(self, *inputs: Tensor | None) -> Tensor:
        count, pattern = len(inputs[0]), tuple(value is None for value in inputs)
        self.rows = self.rows or max(count, 1)
        if count > self.rows:
            raise ValueError(f"this graph is for batches of up to {self.rows} rows, as the first one; got {count}")
        if is_new := pattern not in self.loops:
            static = [value if value is None else value.new_zeros(self.rows, *value.shape[1:]) for value in inputs]
            self.loops[pattern] = _Loop(static, _outputs(self.recorder, partial(self.sample, *static)))
        loop, before = self.loops[pattern], self.counter.network_rows
        for place, value in zip(loop.inputs, inputs, strict=True):
            if value is not None:
                place[:count] = value  # the rows beyond keep what they had
        result = next(loop.outputs)[:count].clone()
        if is_new:
            loop.calls = (self.counter.network_rows - before) // self.rows
        self.counter.network_rows = before + loop.calls * count
        return result


def _outputs(recorder: Recorder, function: Callable[[], Tensor]) -> Iterator[Tensor]:
    """What the function returns, whenever the next one is asked for: once by running it, then by replays.

    It knows nothing of who asks, lest a cycle of references keep a recording's memory until Python looks for cycles.
    """
    yield recorder.run(function)
    # Autocast must take no cast of a weight from outside into the recording, which would not repeat it, nor keep one
    # from inside, whose memory is the recording's.
    torch.clear_autocast_cache()
    replay, output = recorder.record(function)
    torch.clear_autocast_cache()
    while True:
        replay()
        yield output
