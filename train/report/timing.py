"""Wall-clock of lines of a comparison, all in one run, so that the times can be compared."""

from __future__ import annotations

import functools
import time
from dataclasses import replace

from fastdiff.generate import generate
from train.report.methods import Method, Options

BATCH = 128

Timed = tuple[Method, float]  # at one w


def rounds(fast: list[Timed], slow: list[Timed], options: Options, *, count: int, first: int = 0) -> dict[Timed, list]:
    """Seconds of a batch of each: `count` rounds of the fast ones, and the slow ones once, in turn between the rounds.

    So a change of the machine's speed shows on both sides. first: the round after which the first slow one is timed.
    """
    model = functools.cache(lambda path: next(one for one, _ in every if one.checkpoint == path).load(options))

    def seconds(method: Method, w: float, steps: int) -> float:
        start = time.perf_counter()
        sampling = replace(method.sampling(w, options), steps=steps, batch_size=BATCH)
        for images in generate(model(method.checkpoint), BATCH, sampling):
            images.cpu()  # waits for the device
        return time.perf_counter() - start

    every = [*fast, *slow]
    for method, w in every:
        seconds(method, w, min(2, method.steps))  # load, compile, warm up
    times: dict[Timed, list[float]] = {one: [] for one in every}
    gaps = count - 1
    for i in range(count):
        for method, w in [*fast, *(slow[(i - first) % gaps :: gaps] if i < gaps else [])]:
            times[method, w].append(seconds(method, w, method.steps))
    return times
