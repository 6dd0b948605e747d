"""The whole sampler as a function of tensors, (noise, label, w, noises) -> images, with numbers for its schedule."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

import kernels
from fastdiff import data
from fastdiff.denoiser import Denoiser, DenoiserConfig, with_guidance
from fastdiff.generate import Sampling
from fastdiff.samplers import SAMPLERS, SIGMA_INIT

MAX_STEPS = 64  # each is a copy of the network in one graph
SAMPLED = ("ddim", "stochastic", "ancestral", "one_step")  # by one call a step
TIME = 3  # the place of the network's time among a step's numbers


class _Told(Denoiser):
    """A denoiser that is told what its network hears, which else it looks up in its schedule: a graph holds none."""

    def __init__(self, config: DenoiserConfig, network: nn.Module, time: Tensor):
        super().__init__(config, network)
        self._time = time

    def time(self, angle: Tensor) -> Tensor:
        return self._time.expand_as(angle)


class Step(nn.Module):
    """(z (B, C, H, W), numbers (4,) float64, label (B,), guidance (B,)) -> the next z, before noise is added.

    numbers: φ, the step's c_z and c_x on z and x̂, and the time that the network hears.
    guidance: w for all images, which then is no input.
    """

    def __init__(self, denoiser: Denoiser, clip: float | None, guidance: float | None):
        super().__init__()
        # Plain memory: files hold weights in it, and no two of them then share a storage.
        self.network = copy.deepcopy(denoiser.network).to(memory_format=torch.contiguous_format)
        self.config, self.clip, self.guidance = denoiser.config, clip, guidance

    def forward(
        self, z: Tensor, numbers: Tensor, label: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        angle, c_z, c_x = (number.expand(z.shape[:1]) for number in numbers[:TIME])
        cos, sin = angle.cos(), angle.sin()
        if self.guidance:
            guidance = z.new_full(z.shape[:1], self.guidance)
        model = with_guidance(_Told(self.config, self.network, numbers[TIME]))
        v = model.affine(z, angle, label, guidance)
        if self.clip is None:
            return v.combine(z, c_z + c_x * cos, -c_x * sin)
        return v.combine(z, cos, -sin, kernels.Clip(self.clip, c_z, c_x))


class Generator(nn.Module):
    """(noise (B, C, H, W), label (B,), guidance (B,), noises (B, steps − 1, C, H, W)) -> images (B, C, H, W).

    Images are float32 in [−1, 1], or uint8. `inputs` says which arguments there are: label for models with classes,
    guidance for those that can be guided, unless one w is given for all, noises for samplers that add some.
    Raises ValueError for a sampler that is none of SAMPLED.
    """

    def __init__(self, denoiser: Denoiser, sampling: Sampling, *, guidance: float | None = None, uint8: bool = False):
        super().__init__()
        self.config, self.guidance, self.uint8 = denoiser.config, guidance, uint8
        self.sampling = sampling.settled(denoiser.config)
        if self.sampling.sampler not in SAMPLED:
            raise ValueError(f"sampler {self.sampling.sampler!r} is none of {', '.join(SAMPLED)}")
        self.start, numbers, self.stds = _numbers(denoiser, self.sampling)
        self.step = Step(denoiser, denoiser.config.limit if self.sampling.clip else None, guidance)
        self.register_buffer("numbers", numbers)
        self.eval().requires_grad_(False)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the arguments that there are."""
        there = {
            "noise": True,
            "label": bool(self.config.unet.num_classes),
            "guidance": takes_guidance(self.config) and self.guidance is None,
            "noises": any(self.stds),
        }
        return tuple(name for name, is_there in there.items() if is_there)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.config.unet.image_channels, *self.config.unet.image_size

    @property
    def steps(self) -> int:
        return len(self.numbers)

    @property
    def calls(self) -> int:
        """Network calls an image."""
        twice = takes_guidance(self.config) and not self.config.guides_itself and self.guidance != 0
        return self.steps * (1 + twice)

    def example(self, normal: str, labels: str, strengths: str) -> dict[str, str]:
        """For each input, an expression for 8 images: a library's own, with places for shape, classes and w."""
        low, high = self.config.guidance_range or (0.0, 1.0)
        written = {
            "noise": normal.format(shape=(8, *self.image_shape)),
            "label": labels.format(classes=self.config.unet.num_classes),
            "guidance": strengths.format(w=min(max(low, 1.0), high)),
            "noises": normal.format(shape=(8, self.steps - 1, *self.image_shape)),
        }
        return {name: written[name] for name in self.inputs}

    @property
    def made(self) -> str:
        """What 8 images are, in words."""
        return f"{(8, *self.image_shape)}, {'uint8' if self.uint8 else 'float32 in [−1, 1]'}"

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
        self,
        noise: Tensor,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
        noises: Tensor | None = None,
    ) -> Tensor:
        """Float32 images."""
        z = noise if self.start == 1 else self.start * noise
        for index, std in enumerate(self.stds):
            z = self.step(z, self.numbers[index], label, guidance)
            if std:
                z = z + std * noises[:, index]
        return z


def takes_guidance(config: DenoiserConfig) -> bool:
    """Whether w changes what a model makes: it is an input of the network, or there is an unconditional model."""
    return bool(config.unet.num_classes) and (config.guides_itself or config.can_guide)


def _numbers(denoiser: Denoiser, sampling: Sampling) -> tuple[float, Tensor, list[float]]:
    """The factor on the noise at the start, `Step`'s numbers (steps, 4) float64, and the noise added after each."""
    config, steps = denoiser.config, sampling.steps

    def angle(i: int) -> Tensor:
        return torch.tensor([config.schedule.angle(i / steps) if i else 0.0], dtype=torch.float64)

    def row(phi: Tensor, c_z: Tensor, c_x: Tensor) -> Tensor:
        return torch.cat([phi, c_z, c_x, denoiser.time(phi).double()])

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
