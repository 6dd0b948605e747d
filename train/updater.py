"""One update of one network: gradients, optimizer, moving average, and what is to be logged of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastdiff import distributed
from fastdiff.cast import CastWeights
from fastdiff.denoiser import OURS, Denoiser, blank, filled, moved
from fastdiff.errors import UserError
from fastdiff.losses.batch import TIME, Batch
from fastdiff.precision import autocast
from train.options import LoopOptions

MANY_SAMPLES = 10_000  # the fewest over which the share of losses that are not finite is judged
QUARTERS = 4  # of the noise range, for each of which the loss is logged by itself

# The loss of each sample (B,), or that and more values a sample to be logged, by name.
Loss = Callable[[Denoiser, Batch], Tensor | tuple[Tensor, dict[str, Tensor]]]


def new_updater(options: LoopOptions, denoiser: Denoiser, loss: Loss, **settings) -> Updater:
    """An updater with a network that is set up as the options say."""
    denoiser.network.gradient_checkpointing = options.gradient_checkpointing
    if options.dropout is not None:
        for module in denoiser.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = options.dropout
    return Updater(options, denoiser.requires_grad_(True), loss, **settings)


def learn_alone(updater: Updater, updaters: list[Updater]) -> None:
    """Let one of several networks learn; the others pass gradients on but collect none."""
    for other in updaters if len(updaters) > 1 else ():
        other.denoiser.requires_grad_(other is updater)
        other.denoiser.train(other is updater)


class Updater:
    """The state that an update of one network changes: weights, optimizer, EMA, and what is to be logged.

    Each process updates on its part of the batch; gradients are averaged, so that all have the same weights.

    name: before the names of its tensors and logs, where several networks learn. tolerance: the share of samples whose
    loss may be not finite. Those are left out and counted, and what is not finite in a gradient is replaced; with 0,
    the first ends the run.

    Nothing here waits for the device: it runs on the `meta` device, where a wait would raise. `gradients` and `step`
    can be recorded: what changes from update to update lies on the device, in tensors that stay where they are.
    """

    def __init__(self, options: LoopOptions, denoiser: Denoiser, loss: Loss, *, name: str = "", tolerance: float = 0.0):
        self.options, self.denoiser, self.loss = options, denoiser, loss
        self.name, self.tolerance = name, tolerance
        distributed.share(denoiser.state_dict().values())
        self.averaged = copy.deepcopy(denoiser).requires_grad_(False).eval() if options.ema else denoiser
        if options.shard:
            for model in {denoiser, self.averaged}:
                distributed.shard(model.network)
        self.parameters = [p for p in denoiser.parameters() if p.requires_grad]
        if not self.parameters:
            raise UserError(
                f"the network {denoiser.config.network!r} has nothing to learn: all its parameters are frozen"
            )
        self.of_average, self.averaged_over = list(self.averaged.parameters()), list(denoiser.parameters())
        self.device = self.parameters[0].device
        optimizer = torch.optim.AdamW if options.weight_decay else torch.optim.Adam
        on_gpu = self.device.type == "cuda"
        # What a graph reads lies on the GPU, where the optimizer takes it as float32.
        where = {"dtype": torch.float32, "device": self.device} if on_gpu else {"dtype": torch.float64}
        self.lr = torch.zeros((), **where)
        self.optimizer = optimizer(
            self.parameters,
            lr=options.lr,
            betas=options.betas,
            weight_decay=options.weight_decay,
            fused=True if self.device.type in ("cpu", "cuda") else None,
            capturable=on_gpu,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.update_count = 0
        self.number = torch.zeros((), dtype=torch.int64, device=self.device)  # of the update that is being made
        self.ema_weights = {  # of the new weights in the average, by dtype
            dtype: torch.zeros((), dtype=dtype, device=self.device) for dtype in {p.dtype for p in self.of_average}
        }
        self.grad_norm = torch.zeros((), device=self.device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=self.device)
        self.dropped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.watched_from = 0  # the update since which dropped samples are counted
        self.loss_sum = torch.zeros((), device=self.device)
        self.samples = torch.zeros(QUARTERS, device=self.device)
        self.sums: dict[str, Tensor] = {}
        self.start_log()

    def start_log(self) -> None:
        """Forget the sums of what is logged."""
        self.logged_from = self.update_count
        for total in (self.loss_sum, self.samples, *self.sums.values()):
            total.zero_()

    def learning_rate(self) -> float:
        options, n = self.options, self.update_count
        rise = min(1.0, (n + 1) / options.warmup) if options.warmup else 1.0
        return options.lr * rise * (1 - n / options.updates if options.anneal == "linear" else 1.0)

    def update(self, batch: Batch) -> None:
        self.begin()
        distributed.average(self.gradients(batch))
        self.step()
        self.update_count += 1

    def begin(self) -> None:
        """Write down for the device which update is to be made; all processes start it with the first one's buffers."""
        distributed.share(self.denoiser.buffers())
        self.lr.fill_(self.learning_rate())
        self.number.fill_(self.update_count + 1)
        for weight in self.ema_weights.values():
            weight.fill_(1 - min(self.options.ema, (1 + self.update_count) / (10 + self.update_count)))

    def gradients(self, batch: Batch) -> list[Tensor]:
        """Compute this process's gradients; returns those that are to be averaged over the processes before `step`."""
        options = self.options
        if not self.denoiser.training:
            self.denoiser.train()
        with self._weights_of_all_parts():
            for i, part in enumerate(_split(batch, options.accumulate), 1):
                distributed.average_next_gradients(self.denoiser.network, i == options.accumulate)
                self._add_gradients(part)
        return [] if options.shard else [parameter.grad for parameter in self.parameters]

    def _weights_of_all_parts(self) -> AbstractContextManager:
        """Within it, the parts of a batch share the weights that autocast would make for each of them."""
        options, network = self.options, self.denoiser.network
        if options.accumulate == 1 or options.precision != "bf16" or options.compile:
            return nullcontext()
        return CastWeights(network, torch.bfloat16) if self.denoiser.config.network in OURS else nullcontext()

    def _add_gradients(self, part: Batch) -> None:
        with autocast(self.options.precision, self.device):
            losses = self.loss(self.denoiser, part)
        losses, others = losses if isinstance(losses, tuple) else (losses, {})
        finite = torch.isfinite(losses.detach())
        self._log_sums(part, {"loss": losses, **others}, finite)
        if self.tolerance:
            self.dropped += (~finite).sum()
            losses = torch.where(finite, losses, 0)
        loss = losses.mean() / self.options.accumulate
        loss.backward()
        self.loss_sum += loss.detach() / distributed.world_size()

    def step(self) -> None:
        """Update weights and average with the gradients that are there, and forget these.

        Buffers, as those of batch normalization, have no average: the present ones go with it.
        """
        options = self.options
        gradients = [p.grad for p in self.parameters if p.grad is not None]  # a network may not use all that it has
        if self.tolerance:
            for gradient in map(distributed.local, gradients):
                torch.nan_to_num(gradient, nan=0.0, posinf=1e5, neginf=-1e5, out=gradient)
        norm = torch.nn.utils.get_total_norm(gradients)
        if options.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, options.clip_norm, norm)
        self.grad_norm.copy_(distributed.whole(norm))
        is_new = ~torch.isfinite(self.loss_sum + self.grad_norm) & (self.first_bad < 0)
        self.first_bad.copy_(torch.where(is_new, self.number, self.first_bad))
        self.optimizer.step()
        if options.ema:
            average, weights = (
                [distributed.local(p) for p in parameters] if options.shard else parameters
                for parameters in (self.of_average, self.averaged_over)
            )
            with torch.no_grad():
                torch._foreach_lerp_(average, weights, [self.ema_weights[p.dtype] for p in average])
                for kept, current in zip(self.averaged.buffers(), self.denoiser.buffers(), strict=True):
                    kept.copy_(current)
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _log_sums(self, batch: Batch, values: dict[str, Tensor], finite: Tensor) -> None:
        """Add up values of the samples with a finite loss by the quarter of the noise range that each lies in."""
        quarter = (QUARTERS * batch.uniform(TIME)).long()
        self.samples.index_add_(0, quarter, finite.float())
        for name, value in values.items():
            into = self.sums.setdefault(name, torch.zeros_like(self.samples))
            into.index_add_(0, quarter, torch.where(finite, value.detach().float(), 0))

    def log(self) -> dict:
        """What is to be logged of the updates since the last time. Waits for the device."""
        updates, samples = max(1, self.update_count - self.logged_from), distributed.total(self.samples).clamp(min=1)
        row = {
            "loss": float(distributed.total(self.loss_sum)) / updates,
            "grad_norm": float(self.grad_norm),
            "lr": self.learning_rate(),
        }
        if self.tolerance:
            row["dropped"] = int(distributed.total(self.dropped))
        for name, values in sorted(self.sums.items()):  # in one order in all processes
            row[f"{name}_quarters"] = [round(v, 6) for v in (distributed.total(values) / samples).tolist()]
        self.start_log()
        return {self.name + key: value for key, value in row.items()}

    def check_finite(self) -> None:
        """Raises UserError once a loss was not finite, or too many were. Waits for the device."""
        bad, out = int(distributed.largest(self.first_bad)), self.options.out
        if bad >= 0:
            raise UserError(
                f"the loss was not finite at update {bad} of {out}: lower --lr, or use --precision fp32, "
                "and continue with --resume from the last checkpoint before it"
            )
        dropped, samples = (
            int(distributed.total(self.dropped)),
            (self.update_count - self.watched_from) * self.options.batch_size,
        )
        if dropped > self.tolerance * max(samples, MANY_SAMPLES):
            raise UserError(
                f"the losses of {dropped} of {samples} samples were not finite up to update {self.update_count} of "
                f"{out}: lower --lr, or use --precision fp32, and continue with --resume from the last checkpoint"
            )
        if samples >= MANY_SAMPLES:
            self.dropped.zero_()
            self.watched_from = self.update_count

    def model(self) -> Denoiser:
        """The model to save and to use, whole in every process; all have to ask for it together."""
        if not self.options.shard:
            return self.averaged
        weights = {name: distributed.whole(p) for name, p in self.averaged.network.state_dict().items()}
        return moved(filled(blank(self.denoiser.config), weights), self.device)

    def tensors(self) -> dict[str, Tensor]:
        """What `restore` needs, in the first process; all have to ask for it together."""
        tensors = {f"weights/{name}": p for name, p in self.denoiser.network.state_dict().items()}
        if self.options.ema:
            tensors |= {f"ema/{name}": p for name, p in self.averaged.network.state_dict().items()}
        for name, parameter in self.denoiser.network.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{name}/{key}"] = value
        sums = {"loss_sum": self.loss_sum, "samples": self.samples, "dropped": self.dropped}
        sums |= {f"sums/{name}": value for name, value in sorted(self.sums.items())}
        tensors |= {name: distributed.total(value) for name, value in sums.items()}
        return {self.name + name: _for_the_first(tensor) for name, tensor in tensors.items()}

    def counters(self) -> dict[str, int]:
        return {"update": self.update_count, "logged_at": self.logged_from, "watched_from": self.watched_from}

    def restore(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        tensors = _under(tensors, self.name)
        self.update_count = counters["update"]
        self.logged_from = counters.get("logged_at", self.update_count)
        self.watched_from = counters.get("watched_from", self.update_count)
        _load(self.denoiser.network, _under(tensors, "weights/"))
        if self.options.ema:
            _load(self.averaged.network, _under(tensors, "ema/"))
        for name, parameter in self.denoiser.network.named_parameters():
            if not (state := _under(tensors, f"optimizer/{name}/")):
                continue
            self.optimizer.state[parameter] = {
                key: value.to(self.device if self.device.type == "cuda" else "cpu")
                if key == "step"
                else _filled(torch.empty_like(parameter), value)  # in the parameter's own memory layout
                for key, value in state.items()
            }
        if distributed.is_first():  # they are added up over the processes
            self.loss_sum.copy_(tensors["loss_sum"])
            self.samples.copy_(tensors.get("samples", self.samples))
            self.dropped.copy_(tensors.get("dropped", self.dropped))
            self.sums = {name: value.to(self.device) for name, value in _under(tensors, "sums/").items()}


def _split(batch: Batch, parts: int) -> Iterator[Batch]:
    chunks = [[None] * parts if t is None else t.chunk(parts) for t in (batch.x, batch.label, batch.sample_ids)]
    yield from (Batch(*chunk, batch.seed) for chunk in zip(*chunks, strict=True))


@torch.no_grad()
def _load(network: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, parameter in network.state_dict().items():
        if name not in tensors or tensors[name].shape != parameter.shape:
            raise UserError(
                f"the run's checkpoint holds another network than would go on ({name} differs), as earlier ones had "
                "for teachers that predict ε: start it again with --overwrite"
            )
        _filled(parameter, tensors[name])


@torch.no_grad()
def _filled(tensor: Tensor, value: Tensor) -> Tensor:
    """A tensor, sharded or not, with a value that all processes have."""
    return tensor.copy_(distributed.like(value.to(tensor.device), tensor))


def _for_the_first(tensor: Tensor) -> Tensor:
    """A tensor that the first process saves; of a sharded one, no other process keeps the whole."""
    if not distributed.is_sharded(tensor):
        return tensor
    whole = distributed.whole(tensor)
    return whole.cpu() if distributed.is_first() else tensor


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
