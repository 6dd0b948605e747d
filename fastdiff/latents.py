"""The latents of a data set: `fastdiff latents --vae FOLDER --data path/to/images --out latents.safetensors`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

import kernels
from fastdiff import checks, cli, data, files, streams
from fastdiff.errors import UserError
from fastdiff.vae import Vae


@dataclass(frozen=True, kw_only=True)
class Options:
    vae: Path
    """The folder of an AutoencoderKL of diffusers, or of a pipeline with one."""
    data: str = "digits"
    """The images: a name, or a folder, archive or EDM zip of them; their training split."""
    out: Path = Path("latents.safetensors")
    """What every recipe then takes as --data."""
    draw: bool = True
    """Draw each image's latents from what the VAE says of them, by --seed; without, take their mean."""
    seed: int = 0
    batch_size: int = 64
    """Images at a time; the latents do not depend on it."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    overwrite: bool = False
    """Replace the output if it is there already."""


def main(options: Options) -> None:
    """Encode a data set's images, with their labels, into a file of latents."""
    checks.positive(options, "batch_size")
    checks.device(options.device)
    if options.out.suffix != ".safetensors":
        raise UserError(f"--out {options.out}: name a file that ends in .safetensors")
    checks.output(options.out, options.overwrite, file=True)
    dataset, vae = data.load(options.data, "train"), Vae(options.vae, options.device)
    _check(dataset, vae, options)
    parts = []
    for ids in tqdm(torch.arange(len(dataset)).split(options.batch_size), desc="latents", unit="batch"):
        images = data.to_float(torch.from_numpy(dataset.images[ids.numpy()])).to(options.device)
        noise = None
        if options.draw:
            size = (len(ids), vae.network.config.latent_channels, *(side // vae.factor for side in dataset.shape[1:]))
            where = {"sample_ids": ids.to(options.device), "step": streams.LATENTS, "device": options.device}
            noise = kernels.randn(size, seed=options.seed, **where)
        parts.append(vae.encode(images, noise).cpu())
    latents = torch.cat(parts)
    tensors = {"latents": latents.contiguous()}
    told = {"scale": repr(vae.latents.scale), "shift": repr(vae.latents.shift), "vae": vae.latents.vae}
    if dataset.num_classes:
        tensors["labels"] = torch.from_numpy(dataset.labels.copy())
        told["classes"] = json.dumps(dataset.class_names)
    try:
        with files.writing(options.out) as place:
            save_file(tensors, place, metadata=told)
    except OSError as error:
        raise UserError(f"{options.out} was not written ({error.strerror}): make room there") from None
    shape = "×".join(map(str, latents.shape[1:]))
    moments = f"mean {latents.mean():.3f}, deviation {latents.std():.3f}"
    print(f"{len(latents)} latents of {shape}, {moments} -> {options.out}")


def _check(dataset: data.Dataset, vae: Vae, options: Options) -> None:
    """Raises UserError for images that the VAE does not take."""
    channels, height, width = dataset.shape
    if dataset.latents is not None:
        raise UserError(f"--data {options.data} holds latents: name the images that are to become some")
    if channels != vae.channels:
        raise UserError(
            f"--data {options.data} has images of {channels} channels, and --vae {options.vae} takes {vae.channels}"
        )
    if height % vae.factor or width % vae.factor:
        raise UserError(
            f"--data {options.data} has images of {height}×{width} pixels, and --vae {options.vae} makes them "
            f"{vae.factor} times smaller, which does not divide them"
        )


if __name__ == "__main__":
    cli.run(main, Options)
