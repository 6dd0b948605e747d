"""Autocast's weights, cast in one go: PyTorch's autocast launches a kernel for each of them, and for each gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

import torch
from torch import Tensor, nn


class _Cast(torch.autograd.Function):
    """float32 tensors in another dtype; their gradients are all cast back together, once all are there."""

    @staticmethod
    def forward(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_copies(tensors, dtype))

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(o for o, t in zip(output, inputs[1:], strict=True) if not t.requires_grad))

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        wide = iter(_copies([g for g in gradients if g is not None], torch.float32))
        return None, *(None if g is None else next(wide) for g in gradients)


def _copies(tensors: list[Tensor] | tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(t, dtype=dtype) for t in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


def _layers(network: nn.Module) -> Iterator[nn.Module]:
    """Those whose weights autocast casts."""
    return (layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear)))


def cast_for_good(network: nn.Module, dtype: torch.dtype) -> None:
    """Let a network that does not learn keep the weights that autocast would give it; from now on it needs autocast."""
    for layer in _layers(network):
        layer.to(dtype)


class CastWeights:
    """Within it, convolutions and linear layers have weights and biases of another dtype.

    It can be entered again, as a checkpoint's second forward pass does, and then has the same tensors. Within another
    one it finds nothing to cast.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        self.places = [
            (layer._parameters, name)
            for layer in _layers(network)
            for name, parameter in layer._parameters.items()
            if is_whole(parameter) and parameter.dtype == torch.float32
        ]
        self.tensors = _Cast.apply(dtype, *self._held()) if self.places else ()
        self.before: list[list[Tensor]] = []

    def _held(self) -> list[Tensor]:
        return [parameters[name] for parameters, name in self.places]

    def _hold(self, tensors: Iterable[Tensor]) -> None:
        for (parameters, name), tensor in zip(self.places, tensors, strict=True):
            parameters[name] = tensor

    def __enter__(self) -> CastWeights:
        self.before.append(self._held())
        self._hold(self.tensors)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hold(self.before.pop())


def as_autocast(network: nn.Module, device: torch.device) -> AbstractContextManager:
    """Within it, layers have the weights that autocast would give them, if it is on; compilers see to that alone.

    It gives what can be entered to have them again.
    """
    dtype = autocast_dtype(device)
    if dtype is None or torch.compiler.is_compiling() or _is_cast(network, dtype):
        return nullcontext(nullcontext())
    return CastWeights(network, dtype)


def _is_cast(network: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the layers have such weights already, by the first one: to look at all of them takes longer."""
    return all(layer.weight.dtype == dtype for layer in islice(_layers(network), 1))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on a device; None where it is off, as on devices that have none."""
    kind = device.type
    on = torch.is_autocast_enabled(kind) if kind in ("cpu", "cuda") else False
    return torch.get_autocast_dtype(kind) if on else None


def is_whole(tensor: Tensor | None) -> bool:
    """Whether a layer's tensor is there, and not a process's part of it, which has a type of its own."""
    return type(tensor) in (Tensor, nn.Parameter)
