"""Between PyTorch and the kernels: how one is launched, and how it becomes an operator and a differentiable operation.

All kernels start here, so that inspection and tests can see what is launched with what.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, in NumPy, as Triton itself decides
MULTIPROCESSORS = 132  # taken where there is no GPU to ask: an H100's


class Launch(NamedTuple):
    """One launch: `arguments` are the kernel's, tensors, numbers, None and constexprs alike, by name."""

    kernel: triton.runtime.jit.KernelInterface
    grid: tuple[int, ...]
    arguments: dict[str, object]
    num_warps: int
    num_stages: int | None


_listeners: list[Callable[[Launch], None]] = []


def launch(kernel, grid: tuple[int, ...], *, num_warps: int = 4, num_stages: int | None = None, **arguments) -> None:
    """Run `kernel` on the device of its tensors; where they have no data it is only shown to those who `listen`."""
    for listener in _listeners:
        listener(Launch(kernel, grid, arguments, num_warps, num_stages))
    tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
    if tensor.is_meta or isinstance(tensor, FakeTensor) or 0 in grid:
        return
    options = {"num_warps": num_warps} | ({} if num_stages is None else {"num_stages": num_stages})
    with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
        kernel[grid](**arguments, **options)


_library = torch.library.Library("fastdiff", "FRAGMENT")


def operator(name: str) -> Callable:
    """Register a function that allocates its results and launches kernels as the operator fastdiff::name.

    It is its own fake implementation, since `launch` starts nothing on tensors without data. An operator has no
    derivative and says so: `differentiable` makes an operation of one forward and another backward.
    (`torch.library.custom_op` would do the same, but costs five times as much a call, about as long as a small kernel
    runs.)
    """

    def register(function: Callable) -> Callable:
        def refuse(ctx, *gradients):
            raise RuntimeError(_refusal(name))

        _library.define(name + torch.library.infer_schema(function, mutates_args=()))
        for device in ("CPU", "CUDA"):
            _library.impl(name, torch.compiler.disable(function), device)
        torch.library.register_fake(f"fastdiff::{name}", function, lib=_library)
        torch.library.register_autograd(f"fastdiff::{name}", refuse, lib=_library)
        return getattr(torch.ops.fastdiff, name).default

    return register


def _refusal(name: str) -> str:
    return f"fastdiff::{name}: no second derivative; kernels.use('reference') has one"


class _Last(torch.autograd.Function):
    """An operator whose result cannot be differentiated, and says so, for `torch.func.grad` too."""

    @staticmethod
    def forward(operator, *arguments):
        result = operator(*arguments)
        return tuple(result) if isinstance(result, list) else result

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0]._schema.name.removeprefix("fastdiff::")

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(_refusal(ctx.name))


def differentiable(forward: Callable, backward: Callable, saved: Callable, inputs: int = 1) -> Callable:
    """The operator `forward` with the operator `backward` as its gradient: a function of the same arguments.

    Of what forward returns the first is differentiable, in the first `inputs` arguments; backward alone needs the rest.
    saved(arguments, results) -> (tensors, others): what backward takes after the gradient. For one input backward
    returns a gradient; for several it takes a bool for each besides, and returns a list of those that are needed.
    backward may also be a function that calls operators by `last`. Forward-mode derivatives there are none:
    `torch.func.jvp` raises.
    """
    is_operator = isinstance(backward, torch._ops.OpOverload)

    def gradient_of(*arguments):
        return last(backward, *arguments) if is_operator else backward(*arguments)

    class Operation(torch.autograd.Function):
        @staticmethod
        def forward(*arguments):
            return forward(*arguments)

        @staticmethod
        def setup_context(ctx, arguments, output):
            results = output if isinstance(output, tuple) else (output,)
            tensors, ctx.others = saved(arguments, results)
            ctx.save_for_backward(*tensors)
            if others := results[1:]:
                ctx.mark_non_differentiable(*others)
                ctx.set_materialize_grads(False)  # or else they would get gradients of zeros

        @staticmethod
        def backward(ctx, grad, *_):
            needed = ctx.needs_input_grad
            if grad is None:
                return (None,) * len(needed)
            if inputs == 1:
                return gradient_of(grad, *ctx.saved_tensors, *ctx.others), *[None] * (len(needed) - 1)
            gradients = iter(gradient_of(grad, *ctx.saved_tensors, *ctx.others, list(needed[:inputs])))
            return tuple([next(gradients) if need else None for need in needed])

    Operation.forward.__signature__ = inspect.signature(Operation.forward)  # or `apply` works it out in every call

    def run(*arguments):
        """`apply`, or the operator alone where nobody wants a derivative: `apply` takes longer than many a kernel."""
        wanted = _gradient_wanted if torch.compiler.is_compiling() else _derivative_wanted
        return Operation.apply(*arguments) if wanted(arguments) else forward(*arguments)

    return run


def last(operator: Callable, *arguments):
    """Call an operator in a backward pass, as the end of all derivatives."""
    if not torch.compiler.is_compiling() and _derivative_wanted(arguments):
        return _Last.apply(operator, *arguments)
    return operator(*arguments)


def _derivative_wanted(arguments: tuple) -> bool:
    """Whether anybody wants one, `torch.func` and forward mode included, which compilers cannot ask."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return _gradient_wanted(arguments)


def plain_eager() -> bool:
    """Whether neither a compiler nor `torch.func` nor forward mode is at work, but plain autograd at most."""
    if torch.compiler.is_compiling():
        return False
    return not (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def _gradient_wanted(arguments: tuple) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


@contextmanager
def listen(listener: Callable[[Launch], None]) -> Iterator[None]:
    """Show every launch within the block to `listener`, before it runs."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def multiprocessors(device: torch.device) -> int:
    """How many programs the device runs side by side, at least."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def memory_format(x: Tensor) -> torch.memory_format:
    """The order that a kernel walks x's elements in: channels-last where x is so and not also contiguous."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def aligned(*tensors: Tensor | None, to: Tensor) -> list[Tensor | None]:
    """The tensors in the memory order of `to`, copied if need be, so that one offset finds an element in all."""
    order = memory_format(to)
    return [t if t is None else t.contiguous(memory_format=order) for t in tensors]


def needs_reference(*tensors: Tensor | None) -> bool:
    """Whether only the reference can do it: it alone has float64, and samples of 2³⁰ elements and more."""
    return any(t is not None and (t.dtype == torch.float64 or math.prod(t.shape[1:]) >= 2**30) for t in tensors)
