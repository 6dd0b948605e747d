"""A recorder of CUDA graphs for tests on the CPU: it writes down PyTorch's operations instead of kernels.

Like a CUDA graph it repeats them on the same memory without running any Python, computes nothing while it records, and
refuses what cannot be recorded.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
FORBIDDEN = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}


class Tape(TorchDispatchMode):
    """Notes every operation, and raises where one moves data between devices, waits for one or draws from a generator.

    On the CPU there is nothing to move or wait for: the meta device shows that.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "profiler":
            return func(*args, **(kwargs or {}))
        self._keep(func, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tensors_of(args, kwargs, out)}
        if devices and devices != {"cpu"}:
            assert len(devices) == 1, f"{func} moves data between {' and '.join(sorted(devices))}"
            assert not FORBIDDEN & set(func.tags), f"{func} cannot be recorded"
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def _keep(self, func, args, kwargs) -> None:
        """What an operation is about to overwrite."""
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors_of(args[i] if i < len(args) else kwargs.get(argument.name)):
                    storage = tensor.untyped_storage()
                    if tensor.is_cpu and storage._cdata not in self.before:
                        self.before[storage._cdata] = storage, storage.clone()

    def undo(self) -> None:
        for storage, before in self.before.values():
            storage.copy_(before)
        self.before = {}

    @torch.no_grad()
    def repeat(self) -> None:
        for func, args, kwargs, out in self.operations:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    old.copy_(new)  # into the memory that was there when it was recorded


def tensors_of(*values) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class Numbers(TorchFunctionMode):
    """Raises where a tensor on another device is made of the host's numbers, which no operation shows."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor):
            assert out.is_cpu, f"{func.__name__} moves numbers to {out.device}"
        return out


class Recorder:
    """In place of the one that needs CUDA."""

    made: "list[Recorder]"

    def __init__(self, device):
        self.tapes = []
        self.made.append(self)

    def run(self, function):
        return function()

    def record(self, function):
        with torch.random.fork_rng(devices=[]), Tape() as tape, Numbers():
            output = function()
        tape.undo()
        self.tapes.append(tape)
        on_cpu = all(tensor.is_cpu for tensor in tensors_of(output))
        for tensor in tensors_of(output):
            tensor.detach().fill_(torch.nan)  # a recording computes nothing
        return (tape.repeat if on_cpu else lambda: None), output


@contextlib.contextmanager
def standing_in(monkeypatch):
    """The recorders that are made meanwhile.

    On the reference: the CPU's GroupNorm looks at its input to choose a way, which CUDA's does not.
    """
    import kernels
    from fastdiff import checks, graph

    with monkeypatch.context() as patch, kernels.use("reference"):
        patch.setattr(Recorder, "made", [], raising=False)
        patch.setattr(graph, "Recorder", Recorder)
        patch.setattr(checks, "graph", lambda choice, device: None)
        yield Recorder.made
