"""What every loss takes: a batch, and all randomness of it as a function of (seed, sample id).

So nothing that is drawn depends on batch size, device or process count.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from fastdiff import streams

TIME, GUIDANCE = 0, 1  # what `Batch.uniform` draws
# Additive recurrences with these steps fill the unit square evenly: consecutive samples cover all times and
# strengths, each marginally uniform. (1/p and 1/p² for the plastic number p.)
IRRATIONALS = (0.7548776662466927, 0.5698402909980532)


@dataclass(frozen=True)
class Batch:
    """x (B, C, H, W) in [−1, 1], or None where no image is read; label (B,) int64 or None; sample_ids (B,), unique."""

    x: Tensor | None
    label: Tensor | None
    sample_ids: Tensor
    seed: int

    def uniform(self, which: int) -> Tensor:
        """U[0, 1), float64 (B,), evenly spread over consecutive samples; which: TIME or GUIDANCE."""
        start = random.Random(f"{self.seed}/{which}").random()
        return torch.frac(start + self.sample_ids.double() * IRRATIONALS[which])

    def noised(self, angle: Tensor) -> tuple[Tensor, Tensor]:
        """(z, ε) at `angle`."""
        return kernels.add_noise(self.x, angle, seed=self.seed, sample_ids=self.sample_ids, step=streams.NOISE)

    def guidance(self, guidance_range: tuple[float, float] | None) -> Tensor | None:
        """w ~ U[range], float32 (B,)."""
        if guidance_range is None:
            return None
        low, high = guidance_range
        return (low + (high - low) * self.uniform(GUIDANCE)).float()

    def dropped_label(self, probability: float, null: int) -> Tensor | None:
        """The labels, each replaced by the null class with the given probability."""
        if self.label is None:
            return None
        draw = kernels.rand(
            self.label.shape,
            seed=self.seed,
            sample_ids=self.sample_ids,
            step=streams.LABEL_DROP,
            device=self.label.device,
        )
        return torch.where(draw < probability, null, self.label)
