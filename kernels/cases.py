"""The calls that kernels are compiled for (`kernels.inspect`) and timed with (`benchmarks/`): needs no Triton.

Each is a public operation as the published U-Nets, their samplers and losses make it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import kernels


class Case(NamedTuple):
    """One call of a public operation as the U-Nets, samplers and losses make it."""

    name: str
    op: str
    """The function of `kernels`."""
    batch: int
    shape: tuple[int, ...]
    """Of one sample of the image, or of packed qkv."""
    dtype: torch.dtype
    """Of what the network computes; noisy images and coefficients are float32."""
    make: Callable[[int, str], dict]
    """(batch, device) -> keyword arguments of the operation, with random values."""
    gradients: tuple[str, ...] = ()
    """The arguments that are differentiated; none: the case runs under no_grad."""

    def arguments(self, device: str, batch: int | None = None) -> dict:
        arguments = self.make(self.batch if batch is None else batch, device)
        for name in self.gradients:
            arguments[name].requires_grad_()
        return arguments

    def forward(self, arguments: dict, function: Callable | None = None) -> tuple[Tensor, ...]:
        """The results of `function`: the operation itself, or another with the same arguments."""
        with torch.set_grad_enabled(bool(self.gradients)):
            out = (function or getattr(kernels, self.op))(**arguments)
        return out if isinstance(out, tuple) else (out,)

    def backward(self, arguments: dict, out: tuple[Tensor, ...], gradient: Tensor) -> tuple[Tensor, ...]:
        """For one gradient of the first result, and of what has its shape; others get one of ones."""
        wanted = [arguments[name] for name in self.gradients]
        given = [gradient if each.shape == gradient.shape else torch.ones_like(each) for each in out]
        return torch.autograd.grad(out, wanted, given, retain_graph=True)


IMAGES = {"cifar10": (256, (3, 32, 32)), "imagenet64": (64, (3, 64, 64))}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _cases() -> list[Case]:
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        for preset, (batch, shape) in IMAGES.items():
            cases += _image_cases(preset, batch, shape, dtype)
        cases += _group_norm_cases(dtype) + _residual_and_resampling_cases(dtype) + _attention_cases(dtype)
    return cases


def _image_cases(preset: str, batch: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Case]:
    def case(name, op, make, *gradients, **options) -> Case:
        made = partial(make, shape, dtype, **options)
        return Case(f"{name} {preset} {SHORT[dtype]}", op, batch, shape, dtype, made, gradients)

    step = {"guided": True, "clip": 1.0}
    cases = [
        case("guided_step", "guided_step", _guided_step),
        case("update", "affine_update", _update, guided=True),
        case("update+clip", "affine_update", _update, **step),
        case("update+clip+noise", "affine_update", _update, noise=True, **step),
        case("loss teacher", "affine_regression_loss", _loss, "prediction", target=torch.float32),
        case("loss stage1", "affine_regression_loss", _loss, "prediction", target=dtype),
        case("sid", "sid_generator_loss", _sid, "teacher_x", "fake_x", "generated_x"),
        case("add_noise", "add_noise", _add_noise),
        case("randn", "randn", _randn),
    ]
    if preset == "cifar10":
        nchw = {"layout": torch.contiguous_format}
        cases += [
            case("update train", "affine_update", _update, "z", "a", "b", guided=True),
            case("update+clip train", "affine_update", _update, "z", "a", "b", **step),
            case("update student", "affine_update", _update),
            case("update+percentile", "affine_update", _update, guided=True, clip="percentile"),
            case("update+clip nchw", "affine_update", _update, **step, **nchw),
            case("update+clip+noise nchw", "affine_update", _update, noise=True, **step, **nchw),
            case("add_noise nchw", "add_noise", _add_noise, **nchw),
            case("loss one term", "affine_regression_loss", _loss, "prediction", target=torch.float32, terms=1),
            case("loss value", "affine_regression_loss", _loss, target=torch.float32),
        ]
    return cases


GROUP_NORMS = {  # preset -> (channels, height), with scale and shift, SiLU and the bias of the convolution before
    "cifar10": [(256, 32), (256, 16), (256, 8)],
    "imagenet64": [
        *((channels, 64) for channels in (192, 384)),
        *((channels, 32) for channels in (192, 384, 576)),
        *((channels, 16) for channels in (384, 576, 768)),
        *((channels, 8) for channels in (576, 768)),
    ],
}
RESIDUAL_NORMS = {  # preset -> (channels of the sum, of the skip connection, height, SiLU)
    "cifar10": [
        (256, 0, 32, True),
        (256, 0, 16, True),
        (256, 0, 16, False),
        (256, 0, 8, True),
        (256, 0, 8, False),
        (256, 256, 32, True),
        (256, 256, 16, True),
        (256, 256, 8, True),
    ],
    "imagenet64": [
        (192, 0, 64, True),
        (192, 0, 32, True),
        (384, 0, 32, True),
        (384, 0, 32, False),
        (384, 0, 16, True),
        (576, 0, 16, True),
        (576, 0, 16, False),
        (576, 0, 8, True),
        (768, 0, 8, True),
        (768, 0, 8, False),
        (192, 192, 64, True),
        (384, 192, 64, True),
        (384, 192, 32, True),
        (384, 384, 32, True),
        (576, 384, 32, True),
        (576, 384, 16, True),
        (576, 576, 16, True),
        (768, 576, 16, True),
        (768, 576, 8, True),
        (768, 768, 8, True),
    ],
}
ATTENTIONS = [  # (where, batch, tokens, heads, head width)
    ("cifar10", 256, 64, 4, 64),
    ("cifar10", 256, 256, 4, 64),
    ("imagenet64", 64, 64, 12, 64),
    ("imagenet64", 64, 256, 9, 64),
    ("imagenet64", 64, 1024, 6, 64),
    ("narrow", 64, 256, 8, 32),
    ("wide", 64, 256, 2, 128),
    ("ddpm++", 64, 256, 1, 256),
]


def _group_norm_cases(dtype: torch.dtype) -> list[Case]:
    cases = []
    for preset, norms in GROUP_NORMS.items():
        batch, _ = IMAGES[preset]
        for channels, height in norms:
            shape = (channels, height, height)
            of_case = ("group_norm", batch, shape, dtype, partial(_group_norm, shape, dtype))
            gradients = ("x", "weight", "bias", "scale", "shift", "x_bias")
            for what, wanted in (("norm", gradients), ("norm sample", ())):
                cases.append(Case(f"{what} {channels}@{height} {preset} {SHORT[dtype]}", *of_case, wanted))
    for preset, norms in RESIDUAL_NORMS.items():
        batch, _ = IMAGES[preset]
        for channels, skip, height, silu in norms:
            if dtype == torch.float32 and preset == "imagenet64" and skip:
                continue  # one more form of each kernel, and nothing new in any
            shape, more = (channels, height, height), (skip, height, height)
            make = partial(_residual_norm, shape, more, dtype, silu)
            name = f"residual norm{'+silu' * silu} {channels}{f'+{skip}' if skip else ''}@{height} {preset}"
            gradients = ("x", "h", *("skip",) * bool(skip), "weight", "bias", "x_bias")
            both = (channels + skip, height, height)
            cases.append(Case(f"{name} {SHORT[dtype]}", "residual_norm", batch, both, dtype, make, gradients))
    return cases


RESIDUALS = {"cifar10": [(256, 32), (256, 8)], "imagenet64": [(192, 64), (576, 16)]}  # preset -> (channels, height)


def _residual_and_resampling_cases(dtype: torch.dtype) -> list[Case]:
    cases = []
    sums = [(preset, *each, 1.0) for preset, several in RESIDUALS.items() for each in several]
    for preset, channels, height, scale in (*sums, ("cifar10", 256, 32, 0.5**0.5)):
        shape = (channels, height, height)
        make = partial(_residual, shape, dtype, scale)
        name = f"residual{' scaled' * (scale != 1)} {channels}@{height} {preset} {SHORT[dtype]}"
        cases.append(Case(name, "residual_sum", IMAGES[preset][0], shape, dtype, make, ("x", "h", "x_bias")))
    for preset, (channels, height) in {"cifar10": (256, 32), "imagenet64": (192, 64)}.items():
        batch, _ = IMAGES[preset]
        for op, side in (("downsample", height), ("upsample", height // 2)):
            shape = (channels, side, side)
            name = f"{op} {channels}@{side} {preset} {SHORT[dtype]}"
            cases.append(Case(name, op, batch, shape, dtype, partial(_resampling, shape, dtype), ("x",)))
    return cases


def _attention_cases(dtype: torch.dtype) -> list[Case]:
    cases = []
    for where, batch, tokens, heads, width in ATTENTIONS:
        shape = (tokens, 3 * heads * width)
        name = f"attention {tokens}x{heads}x{width} {where} {SHORT[dtype]}"
        make = partial(_attention, shape, dtype, heads)
        cases.append(Case(name, "attention", batch, shape, dtype, make, ("qkv",)))
    return cases


def _image(batch, shape, dtype, device, layout=torch.channels_last) -> Tensor:
    return torch.randn(batch, *shape, device=device).to(dtype).contiguous(memory_format=layout)


def _coefficients(batch, device, *names) -> dict[str, Tensor]:
    return {name: torch.rand(batch, device=device) for name in names}


def _stream(batch, device) -> dict:
    return {"seed": 1, "sample_ids": torch.arange(batch, device=device), "step": 0}


def _update(shape, dtype, batch, device, *, guided=False, clip=None, noise=False, layout=torch.channels_last) -> dict:
    image = partial(_image, batch, shape, device=device, layout=layout)
    arguments = {"z": image(torch.float32), "a": image(dtype)} | _coefficients(batch, device, "coef_z", "coef_a")
    if guided:
        arguments |= {"b": image(dtype)} | _coefficients(batch, device, "coef_b")
    if clip is not None:
        limit = torch.full((batch,), 1.5, device=device) if clip == "percentile" else clip
        arguments["clip"] = kernels.Clip(limit, **_coefficients(batch, device, "coef_z", "coef_x"))
    if noise:
        arguments |= _coefficients(batch, device, "coef_noise") | _stream(batch, device)
    return arguments


def _guided_step(shape, dtype, batch, device) -> dict:
    image = partial(_image, batch, shape, device=device)
    numbers = _coefficients(batch, device, "guidance", "angle_from", "angle_to")
    return {"z": image(torch.float32), "v_cond": image(dtype), "v_uncond": image(dtype)} | numbers


def _loss(shape, dtype, batch, device, *, target, terms=2) -> dict:
    image = partial(_image, batch, shape, device=device)
    arguments = {"prediction": image(dtype), "z": image(torch.float32), "a": image(target), "b": None, "coef_b": None}
    arguments |= _coefficients(batch, device, "coef_z", "coef_a", "weight")
    if terms == 2:
        arguments |= {"b": image(target)} | _coefficients(batch, device, "coef_b")
    return arguments


def _sid(shape, dtype, batch, device) -> dict:
    names = ("teacher_x", "fake_x", "generated_x")
    return {name: _image(batch, shape, dtype, device) for name in names} | {"alpha": 1.0}


def _add_noise(shape, dtype, batch, device, *, layout=torch.channels_last) -> dict:
    x = _image(batch, shape, torch.float32, device, layout)
    return {"x": x, "angle": torch.rand(batch, device=device)} | _stream(batch, device)


def _randn(shape, dtype, batch, device) -> dict:
    return {"shape": (batch, *shape), "device": device} | _stream(batch, device)


def _norm(channels, device) -> dict:
    return {"num_groups": 32, "silu": True} | {k: torch.rand(channels, device=device) for k in ("weight", "bias")}


def _group_norm(shape, dtype, batch, device) -> dict:
    channels = shape[0]
    arguments = {"x": _image(batch, shape, dtype, device), "x_bias": torch.randn(channels, device=device)}
    arguments |= {name: torch.randn(batch, channels, device=device).to(dtype) for name in ("scale", "shift")}
    return arguments | _norm(channels, device)


def _residual_norm(shape, more, dtype, silu, batch, device) -> dict:
    arguments = {name: _image(batch, shape, dtype, device) for name in ("x", "h")}
    arguments |= {"skip": _image(batch, more, dtype, device) if more[0] else None}
    arguments["x_bias"] = torch.randn(shape[0], device=device)
    return arguments | _norm(shape[0] + more[0], device) | {"silu": silu}


def _residual(shape, dtype, scale, batch, device) -> dict:
    arguments = {name: _image(batch, shape, dtype, device) for name in ("x", "h")} | {"scale": scale}
    return arguments | {"x_bias": torch.randn(shape[0], device=device)}


def _resampling(shape, dtype, batch, device) -> dict:
    return {"x": _image(batch, shape, dtype, device)}


def _attention(shape, dtype, heads, batch, device) -> dict:
    return {"qkv": torch.randn(batch, *shape, device=device).to(dtype), "num_heads": heads}


CASES = _cases()
