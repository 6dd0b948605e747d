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
        """For one gradient of all results."""
        wanted = [arguments[name] for name in self.gradients]
        return torch.autograd.grad(out, wanted, [gradient] * len(out), retain_graph=True)


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


GROUP_NORMS = {  # preset -> (channels, height, whether scale and shift, SiLU); 32 groups each
    "cifar10": [
        (256, 32, True, True),
        (256, 16, True, True),
        (256, 8, True, True),
        (256, 16, False, False),
        (512, 32, False, True),
        (512, 16, False, True),
        (512, 8, False, True),
    ],
    "imagenet64": [
        (192, 64, True, True),
        (384, 32, True, True),
        (576, 16, True, True),
        (768, 8, True, True),
        (192, 64, False, True),
        (384, 64, False, True),
        (576, 64, False, True),
        (384, 32, False, False),
        (768, 32, False, True),
        (960, 32, False, True),
        (1152, 16, False, True),
        (1344, 8, False, True),
        (1536, 8, False, True),
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
        for channels, height, modulated, silu in norms:
            if dtype == torch.float32 and preset == "imagenet64" and not modulated:
                continue  # one more form of each kernel, and nothing new in any
            make = partial(_group_norm, (channels, height, height), dtype, modulated, silu)
            biased = ("scale", "shift", "x_bias") if modulated else ()
            what = f"norm{'+modulation' * modulated}{'+silu' * silu} {channels}@{height}"
            gradients = ("x", "weight", "bias", *biased)
            of_case = (batch, (channels, height, height), dtype, make)
            cases.append(Case(f"{what} {preset} {SHORT[dtype]}", "group_norm", *of_case, gradients))
            if modulated:
                cases.append(Case(f"{what} sample {preset} {SHORT[dtype]}", "group_norm", *of_case))
    return cases


RESIDUALS = {  # preset -> (channels, height, the convolutions' biases)
    "cifar10": [(256, 32, ("h_bias",)), (256, 8, ("x_bias", "h_bias"))],
    "imagenet64": [(192, 64, ("x_bias", "h_bias")), (576, 16, ("h_bias",))],
}


def _residual_and_resampling_cases(dtype: torch.dtype) -> list[Case]:
    cases = []
    for preset, sums in RESIDUALS.items():
        batch, _ = IMAGES[preset]
        for channels, height, biases in sums:
            shape = (channels, height, height)
            make = partial(_residual, shape, dtype, biases, 1.0)
            name = f"residual {channels}@{height} {preset} {SHORT[dtype]}"
            cases.append(Case(name, "residual_sum", batch, shape, dtype, make, ("x", "h", *biases)))
    make = partial(_residual, (256, 32, 32), dtype, ("h_bias",), 0.5**0.5)
    name = f"residual scaled 256@32 ddpm++ {SHORT[dtype]}"
    cases.append(Case(name, "residual_sum", 256, (256, 32, 32), dtype, make, ("x", "h", "h_bias")))
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


def _group_norm(shape, dtype, modulated, silu, batch, device) -> dict:
    channels = shape[0]
    arguments = {"x": _image(batch, shape, dtype, device), "num_groups": 32, "silu": silu}
    arguments |= {name: torch.rand(channels, device=device) for name in ("weight", "bias")}
    if modulated:
        arguments |= {name: torch.randn(batch, channels, device=device).to(dtype) for name in ("scale", "shift")}
        arguments["x_bias"] = torch.randn(channels, device=device)  # what is modulated comes from a convolution
    return arguments | {"fork": not modulated}  # and what is not goes on to a sum, too


def _residual(shape, dtype, biases, scale, batch, device) -> dict:
    arguments = {name: _image(batch, shape, dtype, device) for name in ("x", "h")} | {"scale": scale}
    return arguments | {name: torch.randn(shape[0], device=device) for name in biases}


def _resampling(shape, dtype, batch, device) -> dict:
    return {"x": _image(batch, shape, dtype, device)}


def _attention(shape, dtype, heads, batch, device) -> dict:
    return {"qkv": torch.randn(batch, *shape, device=device).to(dtype), "num_heads": heads}


CASES = _cases()
