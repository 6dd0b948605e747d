"""Noise schedules: the noise angle φ(t) for t in [0, 1]; α = cos φ, σ = sin φ, log-SNR λ = −2·log tan φ.

Those of networks that were trained on discrete steps also know the step of an angle.
"""

from __future__ import annotations

import functools
import itertools
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


class StepSchedule(Schedule):
    """Of a network that was trained on `steps` discrete steps, 0 being the cleanest.

    φ(t) is that of the step t·(steps − 1), unless its subclass says else.
    """

    steps: int

    def step(self, angle: Tensor) -> Tensor:
        """The step whose noise an angle has, float64 (B,) from 0 to steps − 1, with fractions between steps.

        Angles beyond the first and the last step get those.
        """
        raise NotImplementedError


class TabulatedSchedule(StepSchedule):
    """Subclasses give log ᾱ of every step; φ = arccos √ᾱ, linear between steps."""

    def log_alpha_bar(self) -> Tensor:
        """log ᾱ of the steps, float64 (steps,) on the CPU, falling; −∞ for no signal at all."""
        raise NotImplementedError

    def angles(self, device: torch.device | str = "cpu") -> Tensor:
        """φ of the steps, float64 (steps,), rising; not to be written to."""
        return _angles(self, torch.device(device))

    def _angle(self, t: Tensor) -> Tensor:
        angles = self.angles(t.device)
        position = t * (self.steps - 1)
        below = position.floor().clamp(0, self.steps - 2).long()
        return torch.lerp(angles[below], angles[below + 1], position - below)

    def step(self, angle: Tensor) -> Tensor:
        angles, angle = self.angles(angle.device), angle.double()
        below = (torch.searchsorted(angles, angle, right=True) - 1).clamp(0, self.steps - 2)
        fraction = (angle - angles[below]) / (angles[below + 1] - angles[below])
        return below + fraction.clamp(0, 1)


@functools.lru_cache(maxsize=16)
def _angles(schedule: TabulatedSchedule, device: torch.device) -> Tensor:
    log_alpha_bar = schedule.log_alpha_bar()
    return torch.atan2((-torch.expm1(log_alpha_bar)).sqrt(), (log_alpha_bar / 2).exp()).to(device)


def zero_terminal_snr(log_alpha_bar: Tensor) -> Tensor:
    """A table of log ᾱ, shifted and scaled in √ᾱ so that its last step is noise alone (arXiv 2305.08891, alg. 1)."""
    root = (log_alpha_bar / 2).exp()
    return 2 * ((root - root[-1]) * root[0] / (root[0] - root[-1])).log()


@dataclass(frozen=True)
class LinearBetaSchedule(TabulatedSchedule):
    """DDPM's: β linear in the step."""

    beta_start: float = 1e-4
    beta_end: float = 0.02
    steps: int = 1000
    zero_terminal: bool = False
    """Whether the table is rescaled so that its last step is noise alone; here and below."""

    def log_alpha_bar(self) -> Tensor:
        betas = torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64, device="cpu")
        return _from_betas(betas, self.zero_terminal)


@dataclass(frozen=True)
class ScaledLinearSchedule(TabulatedSchedule):
    """Latent diffusion's: √β linear in the step."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps: int = 1000
    zero_terminal: bool = False

    def log_alpha_bar(self) -> Tensor:
        roots = self.beta_start**0.5, self.beta_end**0.5
        betas = torch.linspace(*roots, self.steps, dtype=torch.float64, device="cpu").square()
        return _from_betas(betas, self.zero_terminal)


@dataclass(frozen=True)
class CosineBetaSchedule(TabulatedSchedule):
    """Improved DDPM's: ᾱ = cos²(π/2·(k/steps + 0.008)/1.008) but for a constant, and each β at most 0.999."""

    steps: int = 1000
    zero_terminal: bool = False

    def log_alpha_bar(self) -> Tensor:
        ends = torch.arange(self.steps + 1, dtype=torch.float64, device="cpu") / self.steps
        alpha_bar = torch.cos((ends + 0.008) / 1.008 * (math.pi / 2)).square()
        return _from_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999), self.zero_terminal)


@dataclass(frozen=True)
class TableSchedule(TabulatedSchedule):
    """A table of ᾱ of the steps, cleanest first. Raises ValueError unless it falls all the way from ≤ 1 to ≥ 0."""

    alphas_cumprod: tuple[float, ...]

    def __post_init__(self):
        object.__setattr__(self, "alphas_cumprod", tuple(map(float, self.alphas_cumprod)))
        table = self.alphas_cumprod
        if len(table) < 2:
            raise ValueError("a table of ᾱ needs at least 2 steps")
        if not (table[0] <= 1 and table[-1] >= 0):
            raise ValueError(f"a table of ᾱ lies in [0, 1], and this one goes from {table[0]:g} to {table[-1]:g}")
        for step, (here, after) in enumerate(itertools.pairwise(table)):
            if not after < here:
                raise ValueError(
                    f"a table of ᾱ falls from step to step, and this one goes from {here:g} at step {step} to {after:g}"
                )

    @property
    def steps(self) -> int:
        return len(self.alphas_cumprod)

    def log_alpha_bar(self) -> Tensor:
        return torch.tensor(self.alphas_cumprod, dtype=torch.float64, device="cpu").log()


@dataclass(frozen=True)
class VPSchedule(StepSchedule):
    """The continuous form of DDPM's ([EDM] table 1): −log ᾱ = ½·beta_d·s² + beta_min·s, with s from epsilon to 1.

    Its step is [EDM]'s c_noise for such networks, (steps − 1)·s.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon: float = 1e-5
    steps: int = 1000

    def _angle(self, t: Tensor) -> Tensor:
        s = self.epsilon + (1 - self.epsilon) * t
        log_alpha_bar = -(0.5 * self.beta_d * s.square() + self.beta_min * s)
        return torch.atan2((-torch.expm1(log_alpha_bar)).sqrt(), (log_alpha_bar / 2).exp())

    def step(self, angle: Tensor) -> Tensor:
        log_alpha_bar = -torch.log1p(torch.tan(angle.double()).square())
        root = (self.beta_min**2 - 2 * self.beta_d * log_alpha_bar).sqrt()
        return (self.steps - 1) * ((root - self.beta_min) / self.beta_d)


def _from_betas(betas: Tensor, zero_terminal: bool) -> Tensor:
    log_alpha_bar = torch.log1p(-betas).cumsum(0)
    return zero_terminal_snr(log_alpha_bar) if zero_terminal else log_alpha_bar


@dataclass(frozen=True)
class EvenSchedule(StepSchedule):
    """The angles and the steps of another, with times that lie even in the angle.

    Of a few steps that lie even in a table's, the first ones begin and end where noise is all there is.
    """

    of: StepSchedule

    def __post_init__(self):
        if isinstance(self.of, dict):
            object.__setattr__(self, "of", from_dict(self.of))
        if not isinstance(self.of, StepSchedule):
            raise ValueError(f"of is a schedule of steps, not {self.of}")

    @property
    def steps(self) -> int:
        return self.of.steps

    def _angle(self, t: Tensor) -> Tensor:
        start, end = self.of.angle(0.0), self.of.angle(1.0)
        return start + (end - start) * t

    def step(self, angle: Tensor) -> Tensor:
        return self.of.step(angle)

    def to_dict(self) -> dict:
        return {"name": NAMES[type(self)], "of": self.of.to_dict()}


@dataclass(frozen=True)
class KarrasSchedule(Schedule):
    """[EDM] eq. 5: σ^(1/ρ) linear in t, and φ = atan σ."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def _angle(self, t: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return torch.atan((low + t * (high - low)) ** self.rho)


SCHEDULES = {
    "cosine": CosineSchedule,
    "linear-beta": LinearBetaSchedule,
    "scaled-linear-beta": ScaledLinearSchedule,
    "cosine-beta": CosineBetaSchedule,
    "table": TableSchedule,
    "vp": VPSchedule,
    "even": EvenSchedule,
    "karras": KarrasSchedule,
}
NAMES = {cls: name for name, cls in SCHEDULES.items()}


def from_dict(fields: dict) -> Schedule:
    """The schedule that `to_dict` described. Raises ValueError for an unknown name or field."""
    fields = dict(fields)
    name = fields.pop("name", None)
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; known: {', '.join(SCHEDULES)}")
    try:
        return SCHEDULES[name](**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"schedule {name!r}: {error}") from None
