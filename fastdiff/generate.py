"""Images from a model: `generate(model, labels, Sampling(guidance=1.0))`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

import kernels
from fastdiff import data, distributed, files, graph, samplers, streams
from fastdiff.denoiser import Denoiser, DenoiserConfig, Guided, with_guidance
from fastdiff.precision import Precision, autocast
from fastdiff.samplers import SAMPLERS

TEACHER_STEPS = 64  # where neither the user nor the checkpoint says how many


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are drawn; the texts are those of the commands' options."""

    guidance: float | Tensor | None = None
    """Guidance strength w ≥ 0, for all images or (N,) float32; None is 0."""
    steps: int | None = None
    """Sampling steps; default: what the checkpoint was trained for, 64 for teachers."""
    sampler: Literal["ddim", "stochastic", "ancestral", "heun", "one_step"] | None = None
    """Default: what the checkpoint was trained for, ddim for teachers. heun makes 2·steps − 1 calls; it is for teachers
    on the karras schedule."""
    variance: float = 0.3
    """γ of the ancestral sampler, in [0, 1]: its variance between the lower and the upper bound, in the logarithm."""
    clip: bool = True
    """Limit the predicted image to [−1, 1] in every step, unless it is a VAE's latents."""
    seed: int = 0
    batch_size: int = 256
    """Images at a time; the images do not depend on it."""
    precision: Precision = "fp32"
    """bf16: autocast of the network; auto: bf16 where it is found to be faster and within 2e-2 of fp32."""
    graph: graph.Choice = "auto"
    """Record the whole loop of a batch as one CUDA graph and replay it for those that follow, so that the GPU never
    waits for Python. auto: on CUDA, and without one where that fails."""

    def settled(self, config: DenoiserConfig) -> Sampling:
        """With the steps and the sampler that a model was trained for, where it names none."""
        return replace(self, steps=self.steps or config.steps or TEACHER_STEPS, sampler=self.sampler or config.sampler)


@torch.no_grad()
def generate(
    model: nn.Module, labels: Tensor | int, sampling: Sampling, *, noise_ids: Tensor | None = None
) -> Iterator[Tensor]:
    """Yield N images in chunks (B, C, H, W), float32 on the model's device, so that memory does not grow with N.

    Several processes make a part of each chunk, and all get the whole of it.

    labels: (N,) int64; or a number N, for the classes 0, 1, …, num_classes − 1, 0, … in turn, and for models without
    classes. noise_ids: (N,) int64, default 0, 1, …: image i is a function of (seed, noise_ids[i], label, guidance),
    whatever the chunk size. Teachers' guidance takes two calls a step. With a graph, the loop of all steps is replayed
    from the second chunk on (`graph.Captured`). Warns at the end if images were not finite.

    Raises ValueError for an encoder, for precision auto (see `precision.choose`), and for graph "on" without a GPU;
    there UserError where it cannot be recorded.
    """
    if isinstance(model, Denoiser):
        model = with_guidance(model)
    sampling = sampling.settled(model.config)
    if sampling.sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampling.sampler!r} is none of {', '.join(SAMPLERS)}")
    device, guidance = next(model.parameters()).device, sampling.guidance
    num = len(labels) if isinstance(labels, Tensor) else labels
    if not isinstance(labels, Tensor):
        labels = torch.arange(num) % model.num_classes if model.num_classes else None
    ids = torch.arange(num) if noise_ids is None else noise_ids
    draw, bad = _batch(model, sampling, device), torch.zeros((), dtype=torch.int64, device=device)
    for start in range(0, num, sampling.batch_size):
        part = distributed.part(torch.arange(start, min(start + sampling.batch_size, num)))
        here = ids[part].to(device)
        w = samplers.as_guidance(guidance[part] if isinstance(guidance, Tensor) else guidance, here)
        images = draw(here, None if labels is None else labels[part].to(device), w)
        images = distributed.gather(images, min(sampling.batch_size, num - start))
        bad += (~data.are_finite(images)).sum()  # nothing waits for the device before the end
        yield images
    if not bad.is_meta and int(bad) and distributed.is_first():
        files.warn(
            f"{int(bad)} of {num} images ({int(bad) / num:.1%}) are not finite, since weights or outputs of the model "
            "overflow or are NaN: use another checkpoint, or --precision fp32"
        )


def _batch(model: nn.Module, sampling: Sampling, device: torch.device) -> Callable[..., Tensor]:
    """A batch's images from (its noise ids, labels, w), all (B,) on the device.

    Nothing in it may wait for the device or need the host's memory, so that it can be recorded.
    """
    own = {"ancestral": {"variance": sampling.variance}, "one_step": {"sigma": model.config.sigma_init}}
    how = {"schedule": model.schedule, "clip": model.config.limit if sampling.clip else None, "seed": sampling.seed}
    how |= own.get(sampling.sampler, {})

    def draw(sample_ids: Tensor, label: Tensor | None, w: Tensor | None) -> Tensor:
        shape = (len(sample_ids), *model.image_shape)
        noise = kernels.randn(
            shape, seed=sampling.seed, sample_ids=sample_ids, step=streams.INITIAL_NOISE, device=device
        )
        noise = noise.contiguous(memory_format=torch.channels_last)
        with autocast(sampling.precision, device, model):
            return SAMPLERS[sampling.sampler](model, noise, label, w, sampling.steps, sample_ids=sample_ids, **how)

    if not graph.wanted(sampling.graph, device):
        return draw
    counter = model.denoiser if isinstance(model, Guided) else model
    return graph.Captured(draw, counter, device, insists=sampling.graph == "on")
