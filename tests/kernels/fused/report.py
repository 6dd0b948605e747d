"""Print the bytes that each kernel moves, counted in the interpreter, over the least that it could.

    TRITON_INTERPRET=1 python tests/kernels/fused/report.py

The least: each input read once, each result written once.
"""

import os
import sys
from functools import partial

import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    sys.exit("report.py counts in Triton's interpreter: set TRITON_INTERPRET=1")

import shim
from helpers import draw
from traffic import traffic

import kernels

HALF = torch.bfloat16


def image(*shape, dtype=HALF, seed=0):
    return draw(*shape, dtype=dtype, seed=seed, channels_last=True).requires_grad_()


def row(name, operation, inputs, floor, backward_floor=None, images=None):
    """Run forward (without gradients if there is no backward floor) and print what moved over the floors, in bytes.

    images: name of an argument -> its bytes; these are shown alone too, over their own floor.
    """
    with traffic() as forward, torch.set_grad_enabled(backward_floor is not None):
        out = operation()
    counts = [(forward, floor)]
    if backward_floor is not None:
        with traffic() as backward:
            torch.autograd.grad(out, inputs, torch.ones_like(out))
        counts.append((backward, backward_floor))
    cells = []
    for seen, least in counts:
        cells.append(f"{seen.total() / least:.3f}")
        if images is not None:
            alone = {key: seen.read[key] + seen.written[key] for key in images}
            cells[-1] += f" ({sum(alone.values()) / sum(images[key] for key in alone if alone[key]):.3f})"
    print(f"| {name} | {cells[0]} | {cells[1] if len(cells) > 1 else ''} |", flush=True)


def updates():
    z, a, b = image(2, 3, 32, 32, dtype=torch.float32), image(2, 3, 32, 32, seed=1), image(2, 3, 32, 32, seed=2)
    coef, n = torch.ones(2), z.numel()
    three = {"coef_z": coef, "coef_a": coef, "coef_b": coef}
    key = {"seed": 1, "sample_ids": torch.arange(2), "step": 0}
    step = kernels.Clip(1.0, coef, coef)
    row("update: guidance", lambda: kernels.affine_update(z, a, b, **three), (z, a, b), 12 * n, 12 * n)
    row("update: guidance, clip", lambda: kernels.affine_update(z, a, b, clip=step, **three), (z, a, b), 12 * n, 20 * n)
    row(
        "update: … and noise, which is not read",
        lambda: kernels.affine_update(z, a, b, clip=step, coef_noise=coef, **three, **key),
        (),
        12 * n,
    )
    row("forward noising, noise kept", lambda: kernels.add_noise(z, coef, **key)[0], (z,), 12 * n, 8 * n)


def losses():
    p, z, a, b = (image(2, 3, 64, 64, dtype=d, seed=s) for s, d in enumerate((HALF, torch.float32, HALF, HALF)))
    coef, n = torch.ones(2), p.numel()
    three = {"coef_z": coef, "coef_a": coef, "coef_b": coef, "weight": coef}
    stage2 = partial(kernels.affine_regression_loss, p, z, a, b, **three)
    stage1 = partial(kernels.affine_regression_loss, p, a, a, b, **three | {"coef_z": None})
    row("loss of stage 2, residual kept", stage2, (p,), 12 * n, 4 * n)
    row("loss of stage 1, residual kept", stage1, (p,), 8 * n, 4 * n)
    row("loss of stage 2, evaluated only", stage2, (), 10 * n)
    x, y, g = (image(2, 3, 64, 64, dtype=torch.float32, seed=s) for s in range(3))
    row("SiD's generator loss", lambda: kernels.sid_generator_loss(x, y, g, 1.2), (x, y, g), 12 * n, 24 * n)


def norms():
    for channels, side in ((256, 32), (256, 16), (768, 8), (192, 64), (384, 32), (576, 16)):
        x = image(1, channels, side, side)
        weight, bias = (draw(channels, seed=s).requires_grad_() for s in (1, 2))
        scale, shift = (draw(1, channels, seed=s, dtype=HALF).requires_grad_() for s in (3, 4))
        with traffic() as probe, torch.no_grad(), few_programs():
            kernels.group_norm(x, 32, weight, bias, scale=scale, shift=shift, silu=True)
        path = "one pass" if len(probe.kernels) == 1 else "split"
        options = {"scale": scale, "shift": shift, "silu": True}
        small = sum(t.numel() * t.element_size() for t in (weight, bias, scale, shift))
        statistics = 2 * 4 * 32
        with few_programs():
            row(
                f"group norm, scale, shift, SiLU {channels}@{side}, {path} (images alone)",
                partial(kernels.group_norm, x, 32, weight, bias, **options),
                (x, weight, bias, scale, shift),
                4 * x.numel() + small + statistics,
                6 * x.numel() + 2 * small + statistics,
                images=dict.fromkeys(("x", "y", "dx", "dy"), 2 * x.numel()),
            )


class few_programs:
    """Choose paths as for a batch that fills a GPU, though one sample is enough to count."""

    def __enter__(self):
        from kernels.fused import launch

        self.before, launch.MULTIPROCESSORS = launch.MULTIPROCESSORS, 1

    def __exit__(self, *_):
        from kernels.fused import launch

        launch.MULTIPROCESSORS = self.before


def attentions():
    for tokens in (64, 256, 1024):
        qkv = draw(1, tokens, 3 * 64, dtype=HALF).requires_grad_()
        n = tokens * 64
        row(
            f"attention, {tokens} tokens, width 64", lambda q=qkv: kernels.attention(q, 1), (qkv,), 2 * 4 * n, 2 * 7 * n
        )


def main():
    shim.install()
    print("| operation (bfloat16 networks) | forward | backward |\n|---|---:|---:|")
    with kernels.use("triton"):
        for group in (updates, losses, norms, attentions):
            group()


if __name__ == "__main__":
    main()
