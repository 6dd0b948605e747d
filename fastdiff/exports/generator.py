"""The whole sampler as one function of tensors: (noise, label, w, noises) -> images, in numbers instead of schedules."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import kernels
from fastdiff import data
from fastdiff.denoiser import Denoiser, DenoiserConfig, with_guidance
from fastdiff.generate import Sampling
from fastdiff.samplers import SAMPLERS, SIGMA_INIT

MAX_STEPS = 64  # each is a copy of the network in one graph
TIME = 5  # the place of the network's time among a step's numbers
SAMPLED = ("ddim", "stochastic", "ancestral", "one_step")  # by one call a step


class _Known(Denoiser):
    """A denoiser that was told what it would ask of its angle: a graph holds numbers, and no schedules."""

    def __init__(self, config: DenoiserConfig, network: nn.Module, known: Sequence[Tensor]):
        super().__init__(config, network)
        self._time, self._scale, *self._coefficients = known

    def time(self, angle: Tensor) -> Tensor:
        return self._time.expand_as(angle)

    def input_scale(self, angle: Tensor) -> Tensor:
        return self._scale.expand_as(angle)

    def velocity_coefficients(self, angle: Tensor) -> tuple[Tensor, ...]:
        return tuple(coefficient.expand_as(angle) for coefficient in self._coefficients)


class Step(nn.Module):
    """(z (B, C, H, W), numbers (K,) float64, label (B,), guidance (B,)) -> the next z, before noise is added.

    guidance: w for all images, which then is no input.
    """

    def __init__(self, denoiser: Denoiser, clip: float | None, guidance: float | None):
        super().__init__()
        # Plain memory: files hold weights in it, and no two of them then share a storage.
        self.network = copy.deepcopy(denoiser.network).to(memory_format=torch.contiguous_format)
        self.config, self.clip, self.guidance = denoiser.config, clip, guidance

    def forward(self, z: Tensor, numbers: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        angle, cos, sin, c_z, c_x, *known = numbers.unbind()
        if self.guidance:
            guidance = z.new_full(z.shape[:1], self.guidance)
        model = with_guidance(_Known(self.config, self.network, known))
        v = model.affine(z, angle.expand(z.shape[0]), label, guidance)
        if self.clip is None:
            return v.combine(z, (c_z + c_x * cos).expand(z.shape[0]), (-c_x * sin).expand(z.shape[0]))
        limit = kernels.Clip(self.clip, c_z.expand(z.shape[0]), c_x.expand(z.shape[0]))
        return v.combine(z, cos.expand(z.shape[0]), -sin.expand(z.shape[0]), limit)


class Generator(nn.Module):
    """(noise (B, C, H, W), label (B,), guidance (B,), noises (B, steps − 1, C, H, W)) -> images (B, C, H, W).

    Images are float32 in [−1, 1], or uint8. `inputs` says which arguments there are: label for models with classes,
    guidance for those that can be guided, unless one w is given for all, noises for samplers that add some.
    Raises ValueError for a sampler that is none of SAMPLED.
    """

    def __init__(self, denoiser: Denoiser, sampling: Sampling, *, guidance: float | None = None, uint8: bool = False):
        super().__init__()
        self.denoiser_config, self.guidance, self.uint8 = denoiser.config, guidance, uint8
        self.sampling = sampling.settled(denoiser.config)
        if self.sampling.sampler not in SAMPLED:
            raise ValueError(f"sampler {self.sampling.sampler!r} is none of {', '.join(SAMPLED)}")
        self.start, numbers, self.noise = _numbers(denoiser, self.sampling)
        self.step = Step(denoiser, 1.0 if self.sampling.clip else None, guidance)
        self.register_buffer("numbers", numbers)
        self.eval().requires_grad_(False)

    @property
    def steps(self) -> int:
        return len(self.numbers)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the arguments that there are."""
        config = self.denoiser_config
        there = {
            "noise": True,
            "label": bool(config.unet.num_classes),
            "guidance": takes_guidance(config) and self.guidance is None,
            "noises": any(self.noise),
        }
        return tuple(name for name, is_there in there.items() if is_there)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        unet = self.denoiser_config.unet
        return unet.image_channels, *unet.image_size

    def forward(
        self,
        noise: Tensor,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
        noises: Tensor | None = None,
    ) -> Tensor:
        images = self.images(noise, label, guidance, noises)
        return data.to_uint8(images) if self.uint8 else images

    def images(
        self, noise: Tensor, label: Tensor | None, guidance: Tensor | None, noises: Tensor | None
    ) -> Tensor:
        """Float32 images."""
        z = noise if self.start == 1 else self.start * noise
        for index, std in enumerate(self.noise):
            z = self.step(z, self.numbers[index], label, guidance)
            if std:
                z = z + std * noises[:, index]
        return z


def takes_guidance(config: DenoiserConfig) -> bool:
    """Whether w changes what a model makes: it is an input of the network, or there is an unconditional model."""
    inside = config.guidance_range is not None and config.kind != "two_student"
    return bool(config.unet.num_classes) and (inside or config.can_guide)


def _numbers(denoiser: Denoiser, sampling: Sampling) -> tuple[float, Tensor, list[float]]:
    """The factor on the noise at the start, the numbers of every step (steps, K) float64, and the noise added after each.

    A step's are those that `Step` takes apart: φ, its cosine and sine, the step's c_z and c_x on z and x̂, and what the
    denoiser asks of φ.
    """
    config, steps = denoiser.config, sampling.steps

    def angle(i: int) -> Tensor:
        return torch.tensor([config.schedule.angle(i / steps) if i else 0.0], dtype=torch.float64)

    def row(phi: Tensor, c_z: Tensor, c_x: Tensor) -> Tensor:
        asked = (denoiser.time(phi), denoiser.input_scale(phi), *denoiser.velocity_coefficients(phi))
        return torch.cat([phi, phi.cos(), phi.sin(), c_z, c_x, *(one.double() for one in asked)])

    if sampling.sampler == "one_step":
        phi = torch.tensor([math.atan(config.sigma_init or SIGMA_INIT)], dtype=torch.float64)
        return math.sin(phi.item()), row(phi, torch.zeros(1), torch.ones(1))[None], [0.0]
    settings = {"variance": sampling.variance} if sampling.sampler == "ancestral" else {}
    rows, stds = [], []
    for i in range(steps, 0, -1):
        c_z, c_x, std = SAMPLERS[sampling.sampler].rule(angle, i, **settings)
        rows.append(row(angle(i), c_z, c_x))
        stds.append(0.0 if std is None or i == 1 else std.item())
    return 1.0, torch.stack(rows), stds
