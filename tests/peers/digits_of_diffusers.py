"""Small teachers that diffusers trains on scikit-learn's digits by its own training means, with nothing of fastdiff."""

import sys
from pathlib import Path

import diffusers
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from sklearn.datasets import load_digits
from torch import Tensor, nn

BATCH = 64


def ddpm(folder: Path, *, updates: int) -> None:
    """A DDPMPipeline of an unconditional UNet2DModel that predicts the noise."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    scheduler, images = diffusers.DDPMScheduler(), digits()[0]
    to_denoise(net, scheduler, lambda chosen: (images[chosen], {}), len(images), updates=updates)
    diffusers.DDPMPipeline(net, scheduler).save_pretrained(folder)


def dit(folder: Path, *, vae_updates: int, updates: int) -> None:
    """A DiTPipeline: a DiT of the digits' classes on the latents of an AutoencoderKL, 3×4×4 of 1×8×8 pixels."""
    torch.manual_seed(0)
    vae = autoencoder(vae_updates)
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=3,
        out_channels=3,
        num_layers=4,
        sample_size=4,
        patch_size=1,
        num_embeds_ada_norm=10,
    )
    scheduler, (images, labels) = diffusers.DDIMScheduler(), digits()
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item())

    def drawn(chosen: Tensor) -> tuple[Tensor, dict]:
        return latents[chosen] * vae.config.scaling_factor, {"class_labels": labels[chosen]}

    to_denoise(net, scheduler, drawn, len(images), updates=updates)  # it drops labels itself
    diffusers.DiTPipeline(net, vae, scheduler).save_pretrained(folder)


def digits() -> tuple[Tensor, Tensor]:
    """(N, 1, 8, 8) in [−1, 1] and (N,)."""
    found = load_digits()
    return torch.from_numpy(found.images).float()[:, None] / 8 - 1, torch.from_numpy(found.target).long()


def autoencoder(updates: int) -> diffusers.AutoencoderKL:
    vae = diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        latent_channels=3,
        sample_size=8,
    )
    images, _ = digits()

    def loss() -> Tensor:
        x = images[torch.randint(len(images), (BATCH,))]
        code = vae.encode(x).latent_dist
        return (vae.decode(code.sample()).sample - x).square().sum((1, 2, 3)).mean() + 0.02 * code.kl().mean()

    fit(vae, loss, updates)
    return vae.eval()


def to_denoise(net: nn.Module, scheduler, drawn, count: int, *, updates: int) -> None:
    """drawn: the numbers of images -> (them, what the network is told of them)."""

    def loss() -> Tensor:
        x, told = drawn(torch.randint(count, (BATCH,)))
        noise, step = torch.randn_like(x), torch.randint(len(scheduler), (BATCH,))
        return (net(scheduler.add_noise(x, noise, step), step, **told).sample - noise).square().mean()

    fit(net, loss, updates)


def fit(net: nn.Module, loss, updates: int) -> None:
    """Ends with the moving average of the weights."""
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    rate = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=updates // 20, num_training_steps=updates)
    ema = EMAModel(net.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    net.train()
    for _ in range(updates):
        loss().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        ema.step(net.parameters())
    ema.copy_to(net.parameters())


if __name__ == "__main__":
    kind, out, *numbers = sys.argv[1:]
    names = {"ddpm": ("updates",), "dit": ("vae_updates", "updates")}[kind]
    {"ddpm": ddpm, "dit": dit}[kind](Path(out), **dict(zip(names, map(int, numbers), strict=True)))
