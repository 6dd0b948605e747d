"""Print the bytes that each kernel moves, counted in the interpreter, over the least that it could.

    TRITON_INTERPRET=1 python tests/kernels/fused/report.py

The least: each input read once, each result written once.
"""

import os
import sys
from functools import partial
from unittest import mock

import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    sys.exit("report.py counts in Triton's interpreter: set TRITON_INTERPRET=1")

import shim
from traffic import traffic, traffic_of

import kernels

HALF = torch.bfloat16


def image(*shape, dtype=HALF):
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def row(name, operation, inputs, floor, backward_floor=None, images=None):
    """Run forward (without gradients if there is no backward floor) and print what moved over the floors, in bytes.

    images: name of an argument -> its bytes; these are shown alone too, over their own floor.
    """
    if backward_floor is None:
        with traffic() as forward, torch.no_grad():
            operation()
        counts = [forward]
    else:
        counts = traffic_of(operation, inputs)
    cells = ["", ""]
    for index, (seen, least) in enumerate(zip(counts, (floor, backward_floor), strict=False)):
        cells[index] = f"{seen.total() / least:.3f}"
        if images is not None:
            alone = {key: seen.read[key] + seen.written[key] for key in images}
            cells[index] += f" ({sum(alone.values()) / sum(images[key] for key in alone if alone[key]):.3f})"
    print(f"| {name} | {cells[0]} | {cells[1]} |", flush=True)


def updates():
    z, a, b = (image(2, 3, 32, 32, dtype=dtype) for dtype in (torch.float32, HALF, HALF))
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
    p, z, a, b = (image(2, 3, 64, 64, dtype=dtype) for dtype in (HALF, torch.float32, HALF, HALF))
    coef, n = torch.ones(2), p.numel()
    three = {"coef_z": coef, "coef_a": coef, "coef_b": coef, "weight": coef}
    stage2 = partial(kernels.affine_regression_loss, p, z, a, b, **three)
    stage1 = partial(kernels.affine_regression_loss, p, a, a, b, **three | {"coef_z": None})
    row("loss of stage 2, residual kept", stage2, (p,), 12 * n, 4 * n)
    row("loss of stage 1, residual kept", stage1, (p,), 8 * n, 4 * n)
    row("loss of stage 2, evaluated only", stage2, (), 10 * n)
    x, y, g = (image(2, 3, 64, 64, dtype=torch.float32) for _ in range(3))
    row("SiD's generator loss", lambda: kernels.sid_generator_loss(x, y, g, 1.2), (x, y, g), 12 * n, 24 * n)


def norms():
    for channels, side in ((256, 32), (256, 16), (768, 8), (192, 64), (384, 32), (576, 16)):
        x = image(1, channels, side, side)
        weight, bias = (torch.randn(channels, requires_grad=True) for _ in range(2))
        scale, shift = (torch.randn(1, channels, dtype=HALF, requires_grad=True) for _ in range(2))
        norm = partial(kernels.group_norm, x, 32, weight, bias, scale=scale, shift=shift, silu=True)
        with traffic() as probe, torch.no_grad(), few_programs():
            norm()
        path = "one pass" if len(probe.kernels) == 1 else "split"
        small = sum(t.numel() * t.element_size() for t in (weight, bias, scale, shift))
        statistics = 2 * 4 * 32
        with few_programs():
            row(
                f"group norm, scale, shift, SiLU {channels}@{side}, {path} (images alone)",
                norm,
                (x, weight, bias, scale, shift),
                4 * x.numel() + small + statistics,
                6 * x.numel() + 2 * small + statistics,
                images=dict.fromkeys(("x", "y", "dx", "dy"), 2 * x.numel()),
            )


def residual_norms():
    for channels, more, side in ((256, 256, 32), (256, 0, 16), (48, 48, 64), (96, 0, 64)):
        x, h = image(1, channels, side, side), image(1, channels, side, side)
        skip = image(1, more, side, side) if more else None
        weight, bias = (torch.randn(channels + more, requires_grad=True) for _ in range(2))
        norm = partial(kernels.residual_norm, x, h, skip, 32, weight, bias, silu=True)
        inputs, whole = [x, h, weight, bias, *([skip] if more else [])], 2 * (channels + more) * side**2
        one, more = 2 * x.numel(), whole - 2 * x.numel()
        with few_programs(), traffic() as there:
            out = norm()
        with few_programs(), traffic() as back:
            torch.autograd.grad(out, inputs, [torch.ones_like(t) for t in out])
        names = ("x", "h", "skip", "total", "y"), ("x", "skip", "dy", "also", "other", "dx", "dskip")
        moved = [
            sum(seen.read[name] + seen.written[name] for name in each)
            for seen, each in zip((there, back), names, strict=True)
        ]
        floors = 3 * one + more + whole, 3 * whole + one + (more or one)
        cells = " | ".join(f"({each / floor:.3f})" for each, floor in zip(moved, floors, strict=True))
        print(f"| residual norm {channels}+{more // (2 * side**2)}@{side} (images alone) | {cells} |", flush=True)


def few_programs():
    """Choose paths as for a batch that fills a GPU, though one sample is enough to count."""
    return mock.patch("kernels.fused.launch.MULTIPROCESSORS", 1)


def attentions():
    for tokens in (64, 256, 1024):
        qkv = torch.randn(1, tokens, 3 * 64, dtype=HALF, requires_grad=True)
        n = tokens * 64
        name, attention = f"attention, {tokens} tokens, width 64", partial(kernels.attention, qkv, 1)
        row(name, attention, (qkv,), 2 * 4 * n, 2 * 7 * n)


def main():
    shim.install()
    print("| operation (bfloat16 networks) | forward | backward |\n|---|---:|---:|")
    with kernels.use("triton"):
        for group in (updates, losses, norms, residual_norms, attentions):
            group()


if __name__ == "__main__":
    main()
