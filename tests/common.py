"""Small things that the tests share."""

from pathlib import Path

import torch

from fastdiff import checkpoint
from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.unet import UNetConfig
from train import stage2

TINY = UNetConfig((8, 8), 1, 10, channels=8, channel_mult=(1,), blocks=1, middle_attention=False)


def stage2_options(of: Path, out: Path, **changes) -> stage2.Options:
    tiny = {"start_steps": 4, "updates": 6, "last_updates": 8, "save_every": 4, "batch_size": 16, "device": "cpu"}
    return stage2.Options(teacher=of, out=out, **(tiny | changes))


def randomize(denoiser: Denoiser, *, scale: float = 0.3, seed: int = 0) -> Denoiser:
    """Random values in every parameter, in place, so that no branch is zero as it is in a new network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return denoiser


def save_model(folder: Path, *, unet: UNetConfig = TINY, scale: float = 0.2, seed: int = 0, **config) -> Path:
    """A checkpoint with random weights, in which labels and guidance matter."""
    checkpoint.save(folder, randomize(Denoiser(DenoiserConfig(unet, **config)), scale=scale, seed=seed))
    return folder


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module, **tolerance: float) -> None:
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def wide(coefficient: torch.Tensor | float) -> torch.Tensor:
    """(B,) as float64 (B, 1, 1, 1)."""
    return torch.as_tensor(coefficient, dtype=torch.float64).reshape(-1, 1, 1, 1)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file, to see whether anything was touched."""
    files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
