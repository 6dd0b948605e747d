"""Several processes as one: those that torchrun started, over gloo on CPUs and NCCL on GPUs.

Every process does the same work on its own part of each batch, and only the first writes files and prints. Without
torchrun there is one process, and nothing here does anything.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdiff.errors import UserError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # for a process that hangs; one that died is noticed at once
BUCKET = 1 << 24  # bytes of gradients that travel together


def start() -> None:
    """Join the other processes, if torchrun started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)


def stop() -> None:
    if dist.is_initialized():
        gc.collect()  # sharded networks refer to the group, which must not outlive this in them
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The number of this process on its machine, and of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    return rank() == 0


def wait() -> None:
    """For all processes to come here."""
    if world_size() > 1:
        dist.barrier()


def part(rows: Tensor | None) -> Tensor | None:
    """This process's rows of a batch."""
    return rows if rows is None or world_size() == 1 else rows.tensor_split(world_size())[rank()]


def average(tensors: Iterable[Tensor | None]) -> None:
    """Make gradients their mean over the processes, in place; all processes have the same ones."""
    if world_size() == 1:
        return
    tensors, waiting = [t for t in tensors if t is not None], []
    for bucket in _buckets(tensors):
        flat = torch.cat([t.flatten() for t in bucket])
        waiting.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
    for bucket, flat, work in waiting:
        work.wait()
        flat /= world_size()
        for tensor, mean in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def _buckets(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    bucket, size = [], 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
        if size >= BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def total(tensor: Tensor) -> Tensor:
    """The sum over the processes, in all of them."""
    return _reduced(tensor, dist.ReduceOp.SUM)


def largest(tensor: Tensor) -> Tensor:
    """The maximum over the processes, in all of them."""
    return _reduced(tensor, dist.ReduceOp.MAX)


def _reduced(tensor: Tensor, how) -> Tensor:
    if world_size() == 1:
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor, how)
    return tensor


def gather(rows: Tensor, count: int) -> Tensor:
    """All processes' `part`s of `count` rows, in order, in all of them."""
    if world_size() == 1:
        return rows
    sizes = [len(piece) for piece in torch.empty(count).tensor_split(world_size())]
    most = max(sizes)
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    pieces = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(pieces, padded)
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])


def share(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


# --- Networks of which each process keeps a part (FSDP2) -----------------------------------------------------------


def shard(network: nn.Module) -> None:
    """Leave each process a part of each parameter; the whole of a stage exists only while it computes.

    Gradients are then averaged in the backward pass, and each process keeps those of its part. The network cannot be
    copied any more.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(network.parameters()).device.type, (world_size(),))
    network.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other
    stages = [stage for several in network.modules() if isinstance(several, nn.ModuleList) for stage in several]
    for module in (*stages, network):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)  # or else sampling would leave the root whole


def average_next_gradients(network: nn.Module, wanted: bool) -> None:
    """Whether a sharded network's next backward pass averages gradients, or only adds to them in each process."""
    if hasattr(network, "set_requires_gradient_sync"):
        network.set_requires_gradient_sync(wanted)


def is_sharded(tensor: Tensor | None) -> bool:
    if world_size() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, in all processes; any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """A value that all processes have, sharded as `tensor` is."""
    if not is_sharded(tensor):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def first(action: Callable[[], T]) -> T | None:
    """Let the first process do something with files while the others wait; its UserError is raised in all.

    Returns what it returned, in the first process.
    """
    if world_size() == 1:
        return action()
    result, failure = None, None
    if is_first():
        try:
            result = action()
        except UserError as error:
            failure = str(error)
    told = [failure]
    dist.broadcast_object_list(told, 0)
    if told[0] is not None:
        raise UserError(told[0])
    return result
