"""Noise schedules: the noise angle φ(t) for t in [0, 1]; α = cos φ, σ = sin φ, log-SNR λ = −2·log tan φ."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


class Schedule:
    """Subclasses give `_angle(t)` for float64 tensors; t outside [0, 1] is the caller's error."""

    def angle(self, t: Tensor | float) -> Tensor | float:
        """φ(t) in radians, in (0, π/2): a float for a float, a float64 tensor for a tensor."""
        if isinstance(t, Tensor):
            return self._angle(t.double())
        return self._angle(torch.tensor(t, dtype=torch.float64)).item()

    def log_snr(self, t: Tensor | float) -> Tensor | float:
        """λ(t) = −2·log tan φ(t)."""
        if isinstance(t, Tensor):
            return -2 * torch.log(torch.tan(self.angle(t)))
        return -2 * math.log(math.tan(self.angle(t)))

    def _angle(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def to_dict(self) -> dict:
        return {"name": NAMES[type(self)], **asdict(self)}


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """Linear in the angle between log-SNR +limit and −limit ([PD] with λ clipped to [−20, 20])."""

    log_snr_limit: float = 20.0

    def _angle(self, t: Tensor) -> Tensor:
        start, end = (math.atan(math.exp(sign * self.log_snr_limit / 2)) for sign in (-1, 1))
        return start + (end - start) * t


@dataclass(frozen=True)
class LinearBetaSchedule(Schedule):
    """DDPM's: φ = arccos √ᾱ at timestep k = t·(steps − 1), linear between timesteps."""

    beta_start: float = 1e-4
    beta_end: float = 0.02
    steps: int = 1000

    def _angle(self, t: Tensor) -> Tensor:
        betas = torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64, device=t.device)
        log_alpha_bar = torch.log1p(-betas).cumsum(0)
        angles = torch.atan2((-torch.expm1(log_alpha_bar)).sqrt(), (log_alpha_bar / 2).exp())
        position = t * (self.steps - 1)
        below = position.floor().clamp(0, self.steps - 2).long()
        return torch.lerp(angles[below], angles[below + 1], position - below)


@dataclass(frozen=True)
class KarrasSchedule(Schedule):
    """[EDM] eq. 5: σ^(1/ρ) linear in t, and φ = atan σ."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def _angle(self, t: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return torch.atan((low + t * (high - low)) ** self.rho)


SCHEDULES = {"cosine": CosineSchedule, "linear-beta": LinearBetaSchedule, "karras": KarrasSchedule}
NAMES = {cls: name for name, cls in SCHEDULES.items()}


def from_dict(fields: dict) -> Schedule:
    """The schedule that `to_dict` described. Raises ValueError for an unknown name or field."""
    fields = dict(fields)
    name = fields.pop("name", None)
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; known: {', '.join(SCHEDULES)}")
    try:
        return SCHEDULES[name](**fields)
    except TypeError as error:
        raise ValueError(f"schedule {name!r}: {error}") from None
