"""diffusers: the folder of a pipeline of a UNet2DModel, with a scheduler that makes the generator's own steps.

DDIM that limits x̂ is DPM-Solver++ of first order, whose thresholding at most 1 limits it to [−1, 1]. Its table has the
schedule at T times, of which it visits the last of N equal parts. The network looks its time embedding up in as many
rows, so that it hears exactly what it was trained with. What w adds to the embedding is a constant, and goes into a
bias.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import rotation
from fastdiff.blocks import GroupNorm
from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.errors import UserError
from fastdiff.exports.compare import Run
from fastdiff.exports.generator import TIME, Generator
from fastdiff.imports.diffusers import PREDICTS
from fastdiff.imports.model import names
from fastdiff.imports.unet2d import BLOCKS, layout
from fastdiff.unet import UNet, UNetConfig, guidance_features, sinusoids

LIBRARY, RUNTIME, NEEDS = "diffusers", "diffusers", ("diffusers",)
TIMES = 1000  # at least so many in the table, whose ᾱ the scheduler multiplies up in float32
LAST = math.pi / 2 - 1e-5  # the scheduler divides by cos φ
PREDICTIONS = {ours: theirs for theirs, ours in PREDICTS.items()}


def check(config: DenoiserConfig, sampler: str, steps: int, guidance: float) -> None:
    """Raises UserError for what a pipeline of diffusers cannot be, by the field that says so."""
    edm, guided = config.parameterization == "edm", bool(guidance) and not config.guides_itself
    of_model = {
        "network": (config.network != "unet", f"is {config.network!r}, which diffusers does not have"),
        "sampler": (sampler not in ("ddim", "one_step") and steps > 1, f"is {sampler!r}: its scheduler is not there"),
        "outputs": (
            config.unet.outputs > 1,
            f"is {config.unet.outputs} (it predicts ε and x side by side), and its networks have one",
        ),
        "parameterization": (
            config.parameterization not in PREDICTIONS and not (edm and steps == 1),
            f"is {config.parameterization!r}, which its schedulers do not know for several steps",
        ),
        "guidance": (guided, f"{guidance:g} takes two calls a step: distil it first (train.stage1), or give 0"),
    }
    _refuse(of_model)
    _refuse(_of_unet(config.unet))


def _refuse(fields: dict[str, tuple[bool, str]]) -> None:
    for name, (is_wrong, why) in fields.items():
        if is_wrong:
            raise UserError(f"--format diffusers: {name} {why}; onnx and torch can hold this model")


def _of_unet(unet: UNetConfig) -> dict[str, tuple[bool, str]]:
    """By field, whether a UNet2DModel cannot be this network, and why."""
    classes = bool(unet.num_classes)
    levels, norms, widths = range(len(unet.channel_mult)), _groups(unet), _attention_widths(unet)
    attending = any(unet.height(level) in unet.attention_resolutions for level in levels)
    first = unet.channels if unet.input_mult is None else unet.channels * unet.input_mult
    return {
        "patch_size": (unet.patch_size > 1, f"is {unet.patch_size}, and it works on pixels"),
        "label_before_mlp": (unet.label_before_mlp and classes, "is true, and it adds the class behind the layers"),
        "residual_scale": (unet.residual_scale != 1, f"is {unet.residual_scale:g}, and it has 1"),
        "resample_skip_conv": (
            unet.resample_skip_conv and unet.resample == "block" and len(levels) > 1,
            "is true, and it has none where the width stays",
        ),
        "decoder_attention": (
            unet.decoder_attention == "last" and attending,
            "is 'last', and it attends after every block",
        ),
        "input_mult": (unet.input_mult is not None and first != unet.width(0), "differs from channel_mult's first"),
        "channel_mult": (unet.width(0) < unet.channels, "starts below 1, and its time embedding is as wide as that"),
        "heads": (unet.heads is not None and len(widths) > 1, "is a number for all widths, and it has a width for all"),
        "groups": (
            len(norms) > 1,
            f"and min_group_width give norms of {' and '.join(map(str, sorted(norms)))} groups, and it has one number",
        ),
        "image_size": (
            classes and unet.image_size[0] != unet.image_size[1],
            "is not square, as its pipeline of classes wants it",
        ),
    }


def _groups(unet: UNetConfig) -> set[int]:
    """The numbers of groups of all norms."""
    with torch.device("meta"):
        return {module.groups for module in UNet(unet).modules() if isinstance(module, GroupNorm)}


def _attention_widths(unet: UNetConfig) -> set[int]:
    """The widths at which there is attention."""
    levels = range(len(unet.channel_mult))
    widths = {unet.width(level) for level in levels if unet.height(level) in unet.attention_resolutions}
    return widths | ({unet.width(levels[-1])} if unet.middle_attention else set())


class _Table(NamedTuple):
    """What the scheduler and the network look up, by time, cleanest first: (T,) float64."""

    angles: Tensor
    times: Tensor
    """What the network hears."""
    prediction: str
    """What the scheduler takes the network's output for."""
    scale_in: float = 1.0
    scale_out: float = 1.0
    """Factors on the network's input and output."""


def write(generator: Generator, folder: Path) -> None:
    """The folder of a pipeline, for a generator that `check` lets through."""
    import diffusers

    unet, table = generator.config.unet, _table(generator)
    network = diffusers.UNet2DModel(**_network(unet, len(table.times)))
    network.load_state_dict(_weights(generator, table, network.config.block_out_channels[0]))
    alphas = table.angles.cos().square()
    scheduler = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=len(alphas),
        trained_betas=(1 - alphas / alphas.roll(1).index_fill(0, torch.tensor(0), 1.0)).tolist(),
        prediction_type=table.prediction,
        algorithm_type="dpmsolver++",
        solver_order=1,
        thresholding=generator.step.clip is not None,
        sample_max_value=1.0,
        timestep_spacing="trailing",
    )
    kind = diffusers.ConsistencyModelPipeline if unet.num_classes else diffusers.DDPMPipeline
    kind(unet=network, scheduler=scheduler).save_pretrained(folder)


def read(generator: Generator, folder: Path) -> Run:
    """The loop of its pipelines, from given noise."""
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)

    def run(noise: Tensor, label: Tensor | None = None) -> Tensor:
        pipeline.scheduler.set_timesteps(generator.steps)
        z = noise
        for t in pipeline.scheduler.timesteps:
            z = pipeline.scheduler.step(pipeline.unet(z, t, class_labels=label).sample, t, z).prev_sample
        return z

    return run


def calling(generator: Generator) -> list[str]:
    classes = generator.config.unet.num_classes
    labels = f"class_labels=[i % {classes} for i in range(8)], " if classes else ""
    return [
        "from diffusers import DiffusionPipeline",
        "",
        'pipeline = DiffusionPipeline.from_pretrained(".")',
        f"images = pipeline(batch_size=8, {labels}num_inference_steps={generator.steps}).images  # pictures of Pillow",
    ]


def _table(generator: Generator) -> _Table:
    config, steps = generator.config, generator.steps
    if steps == 1:
        return _in_one_step(generator)
    denoiser = Denoiser(config, generator.step.network)
    count = steps * math.ceil(TIMES / steps)
    angles = config.schedule.angle(torch.arange(1, count + 1, dtype=torch.float64) / count)
    return _Table(angles.clamp(max=LAST), denoiser.time(angles), PREDICTIONS[config.parameterization])


def _in_one_step(generator: Generator) -> _Table:
    """The angle and factors with which a scheduler's x̂ is k_z·noise + k_f·F, from any start and with [EDM]'s F."""
    angle, time = generator.numbers[0, :1], generator.numbers[0, TIME]
    parameterization = generator.config.parameterization
    scale = rotation.edm_input_scale(angle).item() if parameterization == "edm" else 1.0
    coef_z, coef_f = (one.item() for one in rotation.velocity_coefficients(parameterization, angle))
    angle = angle.item()
    k_z = generator.start * (math.cos(angle) - math.sin(angle) * coef_z)
    k_f = -math.sin(angle) * coef_f
    if parameterization == "x":
        prediction, x_f = "sample", 1.0
    elif k_z <= 1:
        angle = min(math.acos(k_z), LAST)
        prediction, x_f = "v_prediction", -math.sin(angle)
    else:
        angle = min(math.acos(1 / k_z), LAST)
        prediction, x_f = "epsilon", -math.tan(angle)
    angles = angle * torch.arange(1, TIMES + 1, dtype=torch.float64) / TIMES
    return _Table(angles, time.expand_as(angles), prediction, generator.start * scale, k_f / x_f)


def _network(unet: UNetConfig, times: int) -> dict[str, object]:
    """The settings of the UNet2DModel."""
    levels = range(len(unet.channel_mult))
    attends = [unet.height(level) in unet.attention_resolutions for level in levels]
    resample = "resnet" if unet.resample == "block" else "conv"
    groups = _groups(unet).pop()

    def blocks(way: str, attends: list[bool]) -> list[str]:
        named = {kind: name for name, kind in BLOCKS.items() if way in name.lower()}
        return [named[(True, None) if attending else (False, resample)] for attending in attends]

    heads = unet.head_width if unet.heads is None else (_attention_widths(unet) or {unet.heads}).pop() // unet.heads
    return {
        "sample_size": unet.image_size[0] if unet.image_size[0] == unet.image_size[1] else unet.image_size,
        "in_channels": unet.image_channels,
        "out_channels": unet.image_channels,
        "block_out_channels": [unet.width(level) for level in levels],
        "layers_per_block": unet.blocks,
        "down_block_types": blocks("down", attends),
        "up_block_types": blocks("up", attends[::-1]),
        "downsample_type": resample,
        "upsample_type": resample,
        "downsample_padding": 0 if unet.resample == "conv-asymmetric" else 1,
        "attention_head_dim": heads,
        "add_attention": unet.middle_attention,
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups,
        "norm_eps": unet.eps,
        "dropout": unet.dropout,
        "resnet_time_scale_shift": "scale_shift" if unet.scale_shift else "default",
        "time_embedding_type": "learned",
        "time_embedding_dim": 4 * unet.channels,
        "num_train_timesteps": times,
        "num_class_embeds": unet.num_classes or None,
    }


def _weights(generator: Generator, table: _Table, width: int) -> dict[str, Tensor]:
    """All tensors of the UNet2DModel. width: of its time embedding before the layers."""
    network = Denoiser(generator.config, generator.step.network).conditional().network
    unet = network.config
    with torch.device("meta"):
        plain = UNet(replace(unet, guidance_input=False))
    theirs = names(plain, layout(unet))
    ours = {name: network.get_parameter(name).detach().clone() for name in theirs}
    if unet.num_classes:  # its pipeline draws classes from all that there are: the null class is none
        ours["label_embedding.weight"] = ours["label_embedding.weight"][: unet.num_classes]
    if unet.guidance_input:
        ours["time_mlp.2.bias"] += network.guidance_mlp(guidance_features(torch.tensor([generator.guidance])))[0]
    ours["conv_in.weight"] *= table.scale_in
    ours["conv_out.weight"] *= table.scale_out
    ours["conv_out.bias"] *= table.scale_out
    missing = width - unet.channels
    ours["time_mlp.0.weight"] = F.pad(ours["time_mlp.0.weight"], (0, missing))
    rows = sinusoids(table.times.float() * unet.time_scale, unet.channels, endpoint=unet.time_endpoint)
    found = {"time_proj.weight": F.pad(rows, (0, missing))}
    for name, tensor in ours.items():
        path = name.rpartition(".")[0]
        if path.endswith("attention.qkv"):
            attention = network.get_submodule(path.removesuffix(".qkv"))
            parts = attention.packed(tensor.movedim(0, -1)[(None,) * (3 - tensor.ndim)]).movedim(-1, 0).chunk(3)
            found |= {
                theirs[name].replace(".qkv.", f".to_{part}."): value.reshape(-1, *tensor.shape[1:])
                for part, value in zip("qkv", parts, strict=True)
            }
        else:
            found[theirs[name]] = tensor
    return found
