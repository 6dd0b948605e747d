"""One update of each network that learns, on CUDA as graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastdiff import distributed, files, graph
from fastdiff.losses.batch import Batch
from train.batches import Batches
from train.options import LoopOptions
from train.updater import Updater, learn_alone

WARM_UP = 2  # iterations that compile, choose and make the optimizers' state, before one is recorded
TENSORS = ("x", "label", "sample_ids")  # of a batch
Part = Callable[[], list[Tensor] | None]


class Iteration:
    """Updates each network in turn, each on a batch of its own; the others pass gradients on but collect none.

    What the device does is one CUDA graph (options.graph), or two a network where gradients travel between processes in
    between. What changes from one update to the next lies on the device in places of its own, and is filled in before.
    Where it cannot be recorded, a warning says why, and it goes on without; with graph "on" it raises NotRecordable.
    """

    def __init__(self, updaters: list[Updater], batches: Batches, options: LoopOptions):
        self.updaters, self.batches, self.insists = updaters, batches, options.graph == "on"
        self.inputs: list[Batch] = []  # of each network
        self.parts = _parts(updaters, self.inputs)
        self.recorded: list[Iterator[list[Tensor] | None]] = []
        if graph.wanted(options.graph, updaters[-1].device):
            if options.shard or options.shard_teacher:
                files.warn("updates are not recorded as CUDA graphs where --shard splits networks")
            else:
                recorder = graph.Recorder(updaters[-1].device)
                self.recorded = [graph.repeated(recorder, part, WARM_UP) for part in self.parts]

    def __call__(self) -> None:
        if self.recorded:
            return self._replay()
        for updater in self.updaters:
            learn_alone(updater, self.updaters)
            updater.update(next(self.batches))

    def _replay(self) -> None:
        """The same by recordings, or the parts that are left where one fails."""
        drawn = [next(self.batches) for _ in self.updaters]
        for updater in self.updaters:
            updater.begin()
        gradients, done = None, 0
        try:
            self._fill(drawn)
            for recording in self.recorded:
                gradients = next(recording)
                distributed.average(gradients or ())
                done += 1
        except graph.NotRecordable as error:
            self._give_up(error)
            self.inputs[:] = drawn
            _set_gradients(self.updaters, done, gradients)
            for part in self.parts[done:]:
                distributed.average(part() or ())
        for updater in self.updaters:
            updater.update_count += 1

    def _fill(self, drawn: list[Batch]) -> None:
        """Copy batches to where the recordings read them. Raises NotRecordable for one of another shape."""
        if not self.inputs:
            self.inputs += [_mapped(torch.clone, batch) for batch in drawn]
        for place, batch in zip(self.inputs, drawn, strict=True):
            if _form(place) != _form(batch):
                raise graph.NotRecordable(
                    f"no CUDA graph: batches differ in more than their values ({_form(place)}, then {_form(batch)})"
                )
            _mapped(Tensor.copy_, place, batch)

    def _give_up(self, error: graph.NotRecordable) -> None:
        if self.insists:
            raise error
        if distributed.is_first():
            files.warn(f"updates go on without CUDA graphs, and slower: {error} (--graph off says nothing)")
        self.recorded = []


def _parts(updaters: list[Updater], inputs: list[Batch]) -> list[Part]:
    """What the devices do between two exchanges of gradients, and which are to be exchanged after it."""
    if distributed.world_size() == 1:
        return [partial(_update_all, updaters, inputs)]
    first = [partial(_gradients, updaters, inputs, i) for i in range(len(updaters))]
    return [part for i, updater in enumerate(updaters) for part in (first[i], updater.step)]


def _update_all(updaters: list[Updater], inputs: list[Batch]) -> None:
    for i, updater in enumerate(updaters):
        _gradients(updaters, inputs, i)
        updater.step()


def _gradients(updaters: list[Updater], inputs: list[Batch], i: int) -> list[Tensor]:
    learn_alone(updaters[i], updaters)
    return updaters[i].gradients(inputs[i])


def _set_gradients(updaters: list[Updater], part: int, gradients: list[Tensor] | None) -> None:
    """As they were before a part whose recording failed."""
    for updater in updaters:
        updater.optimizer.zero_grad(set_to_none=True)
    if gradients is not None:
        for parameter, gradient in zip(updaters[part // 2].parameters, gradients, strict=True):
            parameter.grad = gradient


def _mapped(function: Callable[..., Tensor], *batches: Batch) -> Batch:
    """A batch of what the function makes of each of the batches' tensors."""
    tensors = {
        name: None if getattr(batches[0], name) is None else function(*(getattr(batch, name) for batch in batches))
        for name in TENSORS
    }
    return Batch(**tensors, seed=batches[0].seed)


def _form(batch: Batch) -> tuple:
    """All of a batch that a recording holds fixed."""
    shapes = [None if (tensor := getattr(batch, name)) is None else tuple(tensor.shape) for name in TENSORS]
    return *shapes, batch.seed
