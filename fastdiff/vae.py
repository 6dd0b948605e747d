"""diffusers' AutoencoderKL, in whose latents a model may work: from pictures to latents, and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastdiff import files
from fastdiff.data import Latents
from fastdiff.denoiser import DenoiserConfig
from fastdiff.errors import UserError

AT_A_TIME = 16  # images, which are large


def folder_of(path: Path) -> Path:
    """A VAE's folder, or that of a pipeline with one. Raises UserError for others."""
    for folder in (path / "vae", path):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"--vae {path} holds no config.json: name the folder of an AutoencoderKL that diffusers saved")


def latents_of(path: Path) -> Latents:
    """How latents of the VAE in a folder are scaled, as its config.json says. Raises UserError for other VAEs."""
    config = _config(path)
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise UserError(f"--vae {path}: latents_mean and latents_std scale channels apart, which fastdiff does not do")
    weights = next((file for file in sorted(folder_of(path).glob("diffusion_pytorch_model*.safetensors"))), None)
    known = "" if weights is None else hashlib.sha256(weights.read_bytes()).hexdigest()
    try:
        return Latents(float(config.get("scaling_factor", 0.18215)), float(config.get("shift_factor") or 0), known)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--vae {path}: its scaling_factor and shift_factor are no numbers to scale by ({error})"
        ) from None


def _config(path: Path) -> dict:
    file = folder_of(path) / "config.json"
    try:
        config = json.loads(file.read_bytes())
        kind = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged, or not of a network of diffusers ({error})") from None
    if kind != "AutoencoderKL":
        raise UserError(f"--vae {path} is a {kind}, and fastdiff takes an AutoencoderKL")
    return config


class Vae:
    """The VAE in a folder. Raises UserError where it cannot be loaded, or diffusers is not installed."""

    def __init__(self, path: Path, device: str | torch.device = "cpu"):
        self.path, self.latents = path, latents_of(path)
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            raise UserError("--vae needs diffusers: install it (pip install diffusers)") from None
        try:
            network = AutoencoderKL.from_pretrained(folder_of(path), local_files_only=True, low_cpu_mem_usage=False)
        except Exception as error:  # a foreign folder may raise anything
            raise UserError(f"--vae {path} cannot be loaded ({' '.join(str(error).split())[:200]})") from None
        self.network = network.float().to(device).eval().requires_grad_(False)
        self.channels = network.config.in_channels
        self.factor = 2 ** (len(network.config.block_out_channels) - 1)

    def image_shape(self, latent: tuple[int, int, int]) -> tuple[int, int, int]:
        """Of the images whose latents are (C, H, W)."""
        return self.channels, self.factor * latent[1], self.factor * latent[2]

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """The latents of images (B, C, H, W) in [−1, 1], float32: the code's mean, with noise (B, …) a draw of it."""
        codes = []
        for k, part in enumerate(images.split(AT_A_TIME)):
            code = self.network.encode(part.contiguous()).latent_dist
            here = slice(k * AT_A_TIME, k * AT_A_TIME + len(part))
            codes.append(code.mean if noise is None else code.mean + code.std * noise[here])
        return (torch.cat(codes) - self.latents.shift) * self.latents.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The images (B, C, H, W) in [−1, 1] of latents, float32."""
        codes = latents.float().contiguous() / self.latents.scale + self.latents.shift
        return torch.cat([self.network.decode(part).sample.clamp(-1, 1) for part in codes.split(AT_A_TIME)])


def of_model(path: Path | None, config: DenoiserConfig, device: str | torch.device = "cpu") -> Vae | None:
    """The VAE of a model that works in latents; None for one of pixels. Raises UserError where it is another one."""
    if path is None and config.latents is None:
        return None
    if path is None:
        raise UserError("this model makes latents: name the VAE that decodes them by --vae FOLDER")
    check(path, config)
    return Vae(path, device)


def check(path: Path, config: DenoiserConfig) -> None:
    """Raises UserError for a VAE of other latents than the model's; warns where its weights are another file's."""
    if config.latents is None:
        raise UserError(f"--vae {path}: this model makes images, not latents; leave the option out")
    theirs, ours = latents_of(path), config.latents
    if (theirs.scale, theirs.shift) != (ours.scale, ours.shift):
        raise UserError(
            f"--vae {path} scales by {theirs.scale:g} (shift {theirs.shift:g}), and the model's latents were scaled by "
            f"{ours.scale:g} (shift {ours.shift:g}): name the VAE that made them"
        )
    channels = _config(path).get("latent_channels", 4)
    if channels != config.unet.image_channels:
        raise UserError(
            f"--vae {path} has latents of {channels} channels, and the model's have {config.unet.image_channels}: name "
            "the VAE that made them"
        )
    if theirs.vae and ours.vae and theirs.vae != ours.vae:
        files.warn(f"--vae {path} has other weights than the VAE that made the model's latents")


def decoder(vae: Vae | None) -> Callable[[Tensor], Tensor]:
    """From what a model makes to images in [−1, 1]."""
    return (lambda images: images) if vae is None else vae.decode
