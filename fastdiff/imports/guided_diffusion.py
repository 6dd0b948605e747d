"""guided-diffusion (Dhariwal and Nichol, 2021): a `.pt` file of weights, and the flags that are published beside it."""

from __future__ import annotations

import json
import pickle
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.denoiser import DenoiserConfig
from fastdiff.errors import UserError
from fastdiff.imports.account import Settings, Tensors, source
from fastdiff.imports.model import Imported, Layout, Place, buildable, image_outputs, weights
from fastdiff.schedule import CosineBetaSchedule, LinearBetaSchedule
from fastdiff.unet import UNetConfig

FORMAT = "guided-diffusion"
DEFAULTS = {  # of its scripts, for flags that are left out
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "class_cond": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "learn_sigma": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "predict_xstart": False,
    "rescale_timesteps": False,
}
UNPROVEN = (  # by the shapes of the weights
    "num_heads",
    "num_head_channels",
    "use_new_attention_order",
    "diffusion_steps",
    "noise_schedule",
    "predict_xstart",
    "rescale_timesteps",
)
ELSEWHERE = (  # flags of memory, of the loss and of sampling, which do not change the network's output
    "use_checkpoint",
    "use_fp16",
    "timestep_respacing",
    "use_kl",
    "rescale_learned_sigmas",
    "clip_denoised",
    "num_samples",
    "batch_size",
    "use_ddim",
    "model_path",
    "sigma_small",
)
MULTIPLIERS = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}  # where channel_mult is left out
DECIDED_BY = (
    ("time_embed", "num_channels"),
    ("label_emb", "class_cond"),
    ("input_blocks.0.", "num_channels or channel_mult"),
    ("out.", "num_channels or channel_mult"),
    (".qkv", "attention_resolutions, num_res_blocks or channel_mult"),
    (".proj_out", "attention_resolutions, num_res_blocks or channel_mult"),
    (".norm", "attention_resolutions, num_res_blocks or channel_mult"),
    (".op.", "resblock_updown or num_res_blocks"),
    (".1.conv", "resblock_updown or num_res_blocks"),
    (".2.conv", "resblock_updown or num_res_blocks"),
    ("emb_layers", "use_scale_shift_norm, num_channels or channel_mult"),
    ("", "num_res_blocks, channel_mult, num_channels, attention_resolutions or resblock_updown"),
)


def read(path: Path, flags: Mapping[str, Any] | None) -> Imported:
    """The network in a `.pt` file. Raises UserError where flags and weights do not fit together.

    flags: those that it was trained with; None where there are none.
    """
    if flags is None:
        raise UserError(
            f"{path} holds weights alone: give the flags that are published beside them, by --flags FILE "
            "(JSON, or the command line's text) or --flags NAME=VALUE …"
        )
    tensors = Tensors(load(path), path, DECIDED_BY)
    settings = Settings(flags, DEFAULTS, "--flags")
    config, learned = _config(settings, tensors)
    layout = _layout(config.unet)

    def special(name: str, theirs: str, shape: tuple[int, ...]) -> Tensor | None:
        if name.startswith("conv_out"):
            return image_outputs(tensors, theirs, shape, learned=learned, setting="learn_sigma")
        return None

    found = weights(config.unet, layout, tensors, special)
    tensors.finish()
    told = [f"{what} is dropped: {why}" for what, why in tensors.dropped.items()]
    unproven = [f"{name} = {DEFAULTS[name]!r}" for name in settings.defaulted if name in UNPROVEN]
    if unproven:
        told.append(f"taken from guided-diffusion's defaults, as the weights cannot tell: {', '.join(unproven)}")
    return Imported(DenoiserConfig(**vars(config) | {"sources": (source(path, FORMAT),)}), found, tuple(told), "step")


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pt` file, without running code. Raises UserError for a file of anything else."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name the file of a trained network") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged, or holds something else than tensors ({_short(error)}), and nothing else is loaded"
        ) from None
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path} holds something else than tensors by name: name a file of a network's weights alone")
    return found


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def read_flags(given: tuple[str, ...]) -> dict[str, Any] | None:
    """Flags from NAME=VALUE pairs, or from a file of JSON or of a command line. Raises UserError for anything else."""
    if not given:
        return None
    if len(given) == 1 and "=" not in given[0]:
        return _flags_of_file(Path(given[0]))
    pairs = [one.partition("=") for one in given]
    if bad := [one for one, (_, equals, _) in zip(given, pairs, strict=True) if not equals]:
        raise UserError(f"--flags {bad[0]}: give NAME=VALUE, such as image_size=64, or one file")
    return {name.lstrip("-"): _value(value) for name, _, value in pairs}


def _flags_of_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--flags {path} cannot be read ({error}): name a file of JSON or of the flags' text") from None
    if text.lstrip().startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise UserError(f"--flags {path} is no JSON ({error})") from None
    try:
        words = shlex.split(text.replace("\\\n", " ").replace("=", " "))
    except ValueError as error:
        raise UserError(f"--flags {path} is neither JSON nor a command line's text ({error})") from None
    words = [word for part in words for word in part.split()]  # all flags may be one quoted part
    while words and not words[0].startswith("--"):  # such as MODEL_FLAGS, or python script.py
        words.pop(0)
    names, values = words[::2], words[1::2]
    if not names or len(names) != len(values) or not all(name.startswith("--") for name in names):
        raise UserError(
            f"--flags {path} is neither JSON nor the text of flags such as --image_size 64 --class_cond True"
        )
    return {name.lstrip("-"): _value(value) for name, value in zip(names, values, strict=True)}


def _value(text: str) -> Any:
    if text.lower() in ("true", "false", "yes", "no"):
        return text.lower() in ("true", "yes")
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _config(settings: Settings, tensors: Tensors) -> tuple[DenoiserConfig, bool]:
    """The denoiser's configuration, and whether half of the outputs predict the variance."""
    settings.ignore(*ELSEWHERE)
    size, channels, blocks = (settings.whole(name) for name in ("image_size", "num_channels", "num_res_blocks"))
    multipliers = _multipliers(settings, size)
    heads, head_width = settings.whole("num_heads"), settings["num_head_channels"]
    settings.expect("num_heads_upsample", -1, heads)
    if head_width != -1:
        head_width = settings.whole("num_head_channels")
    # As there, by how much smaller a level is than the image, whatever comes of the division.
    factors = [size // one for one in _list(settings, "attention_resolutions", int) if one > 0]
    steps = settings.whole("diffusion_steps", least=2)
    classes = tensors.shape("label_emb.weight")[0] if settings.expect("class_cond", False, True) else 0
    learned = settings.expect("learn_sigma", False, True)
    rescaled = settings.expect("rescale_timesteps", False, True)
    unet = UNetConfig(
        (size, size),
        tensors.shape("input_blocks.0.0.weight")[1],
        classes,
        channels=channels,
        channel_mult=multipliers,
        blocks=blocks,
        attention_resolutions=tuple(size >> level for level in range(len(multipliers)) if 2**level in factors),
        head_width=None if head_width == -1 else head_width,
        heads=heads if head_width == -1 else None,
        dropout=settings.number("dropout"),
        scale_shift=settings.expect("use_scale_shift_norm", True, False),
        resample="block" if settings.expect("resblock_updown", True, False) else "conv",
        min_group_width=1,
        qkv_order="qkv-head" if settings.expect("use_new_attention_order", True, False) else "head-qkv",
        time_scale=1000 / steps if rescaled else 1.0,
        null_class=False,
    )
    scale = 1000 / steps
    schedule = {
        "linear": LinearBetaSchedule(scale * 1e-4, scale * 0.02, steps),
        "cosine": CosineBetaSchedule(steps),
    }[settings.expect("noise_schedule", "linear", "cosine")]
    predicts = "x" if settings.expect("predict_xstart", False, True) else "eps"
    settings.finish()
    return DenoiserConfig(buildable(unet, settings.place), schedule, predicts, time="step"), learned


def _multipliers(settings: Settings, size: int) -> tuple[int | float, ...]:
    given = settings["channel_mult"]
    if given != "":
        return tuple(_list(settings, "channel_mult", float))
    if size not in MULTIPLIERS:
        raise UserError(f"{settings.place}: for images of {size} pixels channel_mult has to be given, such as 1,2,2")
    return MULTIPLIERS[size]


def _list(settings: Settings, name: str, kind: type) -> list:
    """Numbers with commas between them, as the flags have them; or a list, or one number."""
    value = settings[name]
    try:
        found = [kind(one) for one in (value if isinstance(value, list) else str(value).split(","))]
    except (TypeError, ValueError):
        raise settings.refuse(name, "numbers with commas between them") from None
    return [int(one) if one == int(one) else one for one in found]


def _layout(unet: UNetConfig) -> Layout:
    last = len(unet.channel_mult) - 1

    def block(place: Place) -> str:
        if place.part == "encoder":
            return f"input_blocks.{place.position + 1}.0"
        if place.part == "middle":
            return f"middle_block.{2 * place.index}"
        before = place.position - (last - place.level)  # the blocks before it, without those that double the image
        if place.resample is None:
            return f"output_blocks.{before}.0"
        return f"output_blocks.{before - 1}.{2 if unet.height(place.level) in unet.attention_resolutions else 1}"

    def attends(place: Place) -> str:
        return "middle_block.1" if place.part == "middle" else f"{block(place).rpartition('.')[0]}.1"

    return Layout(
        ends={
            "time_mlp.0": "time_embed.0",
            "time_mlp.2": "time_embed.2",
            "label_embedding": "label_emb",
            "conv_in": "input_blocks.0.0",
            "norm_out": "out.0",
            "conv_out": "out.2",
        },
        residual={
            "norm1": "in_layers.0",
            "conv1": "in_layers.2",
            "embed": "emb_layers.1",
            "norm2": "out_layers.0",
            "conv2": "out_layers.3",
            "skip": "skip_connection",
        },
        attention={"norm": "norm", "qkv": "qkv", "project": "proj_out"},
        block=block,
        attends=attends,
        conv=lambda place: "op" if place.resample == "down" else "conv",
    )
