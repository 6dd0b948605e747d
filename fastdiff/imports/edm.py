"""EDM (Karras et al., 2022): a `network-snapshot.pkl` of DDPM++ or ADM, read without running code."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff import rotation
from fastdiff.denoiser import DenoiserConfig
from fastdiff.errors import UserError
from fastdiff.imports import unpickle
from fastdiff.imports.account import Settings, Tensors, source
from fastdiff.imports.model import Imported, Layout, Place, buildable, sine_first, weights
from fastdiff.schedule import KarrasSchedule, TableSchedule, VPSchedule
from fastdiff.unet import UNetConfig

FORMAT = "EDM"
RECONSTRUCT = "torch_utils.persistence._reconstruct_persistent_obj"
COMMON = {  # the defaults of its classes, for arguments that are left out
    "label_dim": 0,
    "use_fp16": False,
    "augment_dim": 0,
    "channel_mult_emb": 4,
    "dropout": 0.10,
    "label_dropout": 0,
}
PRECONDITIONERS = {
    "EDMPrecond": {"sigma_min": 0, "sigma_max": math.inf, "sigma_data": 0.5, "model_type": "DhariwalUNet"},
    "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5, "model_type": "SongUNet"},
    "iDDPMPrecond": {"C_1": 0.001, "C_2": 0.008, "M": 1000, "model_type": "DhariwalUNet"},
}
NETWORKS = {
    "SongUNet": {
        "model_channels": 128,
        "channel_mult": [1, 2, 2, 2],
        "num_blocks": 4,
        "attn_resolutions": [16],
        "embedding_type": "positional",
        "channel_mult_noise": 1,
        "encoder_type": "standard",
        "decoder_type": "standard",
        "resample_filter": [1, 1],
    },
    "DhariwalUNet": {
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "num_blocks": 3,
        "attn_resolutions": [32, 16, 8],
    },
}


@dataclass
class Module:
    """A module of the pickle: its class, its tensors by name, its submodules, and its plain attributes."""

    kind: str
    tensors: dict[str, Tensor]
    modules: dict[str, Module]
    values: dict[str, Any] = field(repr=False)

    def named_tensors(self, prefix: str = "") -> dict[str, Tensor]:
        own = {prefix + name: tensor for name, tensor in self.tensors.items()}
        for name, module in self.modules.items():
            own |= module.named_tensors(f"{prefix}{name}.")
        return own

    def named_modules(self, prefix: str = ""):
        for name, module in self.modules.items():
            yield prefix + name, module
            yield from module.named_modules(f"{prefix}{name}.")


def read(path: Path) -> Imported:
    """The network in a snapshot, its moving average if there are several. Raises UserError for any other file."""
    outer = _module(_network(unpickle.load(path), path), path)
    if outer.kind not in PRECONDITIONERS:
        raise UserError(
            f"{path} holds a {outer.kind}, and of EDM's networks fastdiff reads {', '.join(PRECONDITIONERS)} "
            "(VE's takes its images unscaled)"
        )
    given = outer.values.get("_init_kwargs")
    if outer.values.get("_init_args") or not isinstance(given, dict):
        raise UserError(
            f"{path} does not say how its network was built (no _init_kwargs): take a snapshot of EDM's own"
        )
    inside = PRECONDITIONERS[outer.kind]
    kind = given.get("model_type", inside["model_type"])
    if kind not in NETWORKS or outer.modules.get("model") is None or outer.modules["model"].kind != kind:
        raise UserError(f"{path}: model_type is {kind!r}, and fastdiff reads {' and '.join(NETWORKS)}")
    settings = Settings(given, COMMON | inside | NETWORKS[kind], path)
    settings.ignore("model_type", "use_fp16")
    unet = _unet(settings, kind)
    config = _preconditioner(settings, outer, unet)
    settings.finish()
    network = outer.modules["model"]
    _check_modules(network, unet, path)
    tensors = Tensors(network.named_tensors(), path, (("", "_init_kwargs"),))
    found = _weights(unet, kind, tensors, variance=outer.kind == "iDDPMPrecond")
    told = [f"{what} is dropped: {why}" for what, why in tensors.dropped.items()]
    config = DenoiserConfig(**vars(config) | {"sources": (source(path, f"{FORMAT} {outer.kind} {kind}"),)})
    return Imported(config, found, tuple(told), "sigma")


# --- The pickle ---


def _network(found: Any, path: Path) -> Any:
    if isinstance(found, dict):
        found = found.get("ema", found.get("net"))
    if not isinstance(found, unpickle.Stub) or found.name != RECONSTRUCT:
        holds = found.name if isinstance(found, unpickle.Stub) else type(found).__name__
        raise UserError(f"{path} holds no network of EDM's, but {holds!r}: name its network-snapshot-*.pkl")
    return found


def _module(stub: Any, path: Path) -> Module:
    """A module from the objects in its place. Raises UserError where they are none."""
    kind, state = "?", None
    if isinstance(stub, unpickle.Stub):
        kind, state = stub.name.rpartition(".")[2], stub.state
        if stub.name == RECONSTRUCT and len(stub.arguments) == 1 and isinstance(stub.arguments[0], dict):
            kind, state = (stub.arguments[0].get(key) for key in ("class_name", "state"))
    if not isinstance(state, dict) or not isinstance(kind, str):
        raise UserError(
            f"{path}: where a module of a network should be is something else ({kind}): take EDM's own file"
        )
    tensors, modules = {}, {}
    for part in ("_parameters", "_buffers"):
        for name, value in _dict(state, part, path).items():
            if value is None:
                continue
            if not isinstance(value, Tensor):
                what = value.name if isinstance(value, unpickle.Stub) else type(value).__name__
                raise UserError(f"{path}: where the tensor {name} should be is something else ({what})")
            tensors[name] = value
    for name, value in _dict(state, "_modules", path).items():
        if value is not None:
            modules[name] = _module(value, path)
    return Module(kind, tensors, modules, state)


def _dict(state: dict, part: str, path: Path) -> dict:
    found = state.get(part, {})
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise UserError(f"{path}: where {part} of a network should be is something else: take EDM's own file")
    return found


# --- The network ---


def _unet(settings: Settings, kind: str) -> UNetConfig:
    size, channels, classes = settings.whole("img_resolution"), settings.whole("img_channels"), settings["label_dim"]
    if type(classes) is not int or classes < 0:
        raise settings.refuse("label_dim", "whole numbers from 0")
    settings.ignore("augment_dim")
    settings.expect("channel_mult_emb", 4)
    common = {
        "channels": settings.whole("model_channels"),
        "channel_mult": settings.numbers("channel_mult"),
        "blocks": settings.whole("num_blocks"),
        "attention_resolutions": tuple(settings.numbers("attn_resolutions")),
        "dropout": settings.number("dropout"),
        "qkv_order": "head-width-qkv",
        "time_scale": 1.0,
        "null_class": settings.number("label_dropout") > 0,
    }
    if kind == "SongUNet":
        settings.expect("embedding_type", "positional")
        settings.expect("channel_mult_noise", 1)
        settings.expect("encoder_type", "standard")
        settings.expect("decoder_type", "standard")
        if list(settings.numbers("resample_filter")) != [1, 1]:
            raise settings.refuse("resample_filter", "[1, 1] (DDPM++'s; NCSN++'s is another)")
        common |= {
            "head_width": None,
            "input_mult": 1,
            "scale_shift": False,
            "resample_skip_conv": True,
            "residual_scale": 0.5**0.5,
            "eps": 1e-6,
            "decoder_attention": "last",
            "time_endpoint": True,
            "label_before_mlp": True,
        }
    return buildable(UNetConfig((size, size), channels, classes, **common), settings.place)


def _preconditioner(settings: Settings, outer: Module, unet: UNetConfig) -> DenoiserConfig:
    match outer.kind:
        case "EDMPrecond":
            settings.expect("sigma_data", rotation.SIGMA_DATA)
            low, high = settings.number("sigma_min"), settings.number("sigma_max")
            usual = KarrasSchedule()
            schedule = KarrasSchedule(max(low, usual.sigma_min), min(high, usual.sigma_max))
            return DenoiserConfig(unet, schedule, "edm", time="log-sigma")
        case "VPPrecond":
            numbers = (settings.number(name) for name in ("beta_d", "beta_min", "epsilon_t"))
            return DenoiserConfig(unet, VPSchedule(*numbers, settings.whole("M")), "eps", time="step")
    # Improved DDPM's steps count from the noisiest, by σ in a buffer; its last entry is σ = 0, which is no step.
    settings.ignore("C_1", "C_2", "M")
    sigma = outer.tensors.get("u")
    if sigma is None or sigma.ndim != 1 or len(sigma) < 3:
        raise UserError(f"{settings.place} has no table of noise levels (the buffer u): take EDM's own file")
    try:
        table = TableSchedule(tuple((1 / (1 + sigma[:-1].double().square())).flip(0).tolist()))
    except ValueError as error:
        raise UserError(f"{settings.place}: {error}") from None
    return DenoiserConfig(unet, table, "eps", time="nearest-step")


def _check_modules(network: Module, unet: UNetConfig, path: Path) -> None:
    """Raises UserError where a module's own attributes are not those that the network's arguments mean.

    They are what its code computes with, and no tensor shows them.
    """
    song = network.kind == "SongUNet"
    for name, module in network.named_modules():
        values = module.values
        match module.kind:
            case "UNetBlock":
                attends = "qkv" in module.modules
                width = values.get("out_channels")
                heads = (1 if song else width // 64) if attends and isinstance(width, int) else 0
                expected = {
                    "skip_scale": unet.residual_scale,
                    "adaptive_scale": unet.scale_shift,
                    "num_heads": heads,
                }
            case "GroupNorm":
                width = len(module.tensors["weight"]) if "weight" in module.tensors else 0
                expected = {"eps": unet.eps, "num_groups": min(32, width // 4)}
            case "PositionalEmbedding":
                expected = {"max_positions": 10000, "endpoint": song, "num_channels": unet.channels}
            case "Conv2d":
                expected = {"fused_resample": False}
                filter_ = module.tensors.get("resample_filter")
                if filter_ is not None and not torch.equal(filter_, torch.full((1, 1, 2, 2), 0.25)):
                    raise UserError(f"{path}: {name} resamples by another filter than [1, 1], which fastdiff's has")
            case "Linear" | "ModuleDict":
                continue
            case other:
                raise UserError(f"{path}: {name} is a {other}, which is none of the layers of DDPM++ and ADM")
        for key, value in expected.items():
            found = values.get(key)
            if not isinstance(found, (int, float)) or abs(found - value) > 1e-9:
                raise UserError(f"{path}: {name} has {key} = {found!r}, and fastdiff's network has {value!r} there")


def _weights(unet: UNetConfig, kind: str, tensors: Tensors, *, variance: bool) -> dict[str, Tensor]:
    song = kind == "SongUNet"
    for name in [name for name in tensors if name.endswith("resample_filter")]:
        tensors.ignore(name)
    tensors.drop("map_augment.weight", "its augmentation labels are zero outside of its training")

    def special(name: str, theirs: str, shape: tuple[int, ...]) -> Tensor | None:
        if name == "label_embedding.weight":
            return _labels(unet, tensors, song)
        if name == "time_mlp.0.weight" and song:
            return sine_first(tensors.take(theirs, shape))
        if name.startswith("conv_out") and variance:
            tensors.note(f"half of {theirs}", "it predicts the variance of DDPM's steps, which fastdiff does not use")
            return tensors.take(theirs, (2 * shape[0], *shape[1:]))[: shape[0]]
        return None

    found = weights(unet, _layout(unet, song), tensors, special)
    tensors.finish()
    return found


def _labels(unet: UNetConfig, tensors: Tensors, song: bool) -> Tensor:
    """The label's linear layer as a table of its columns; the null class is no label, so the bias alone."""
    columns = unet.channels if song else 4 * unet.channels
    table = tensors.take("map_label.weight", (columns, unet.num_classes)).T
    if song:
        table = table * unet.num_classes**0.5
    null = tensors.take("map_label.bias", (columns,)) if song else torch.zeros(columns)
    table = torch.cat([table, torch.zeros(int(unet.null_class), columns)]) + null
    return sine_first(table) if song else table


def _layout(unet: UNetConfig, song: bool) -> Layout:
    def at(level: int) -> str:
        return "{0}x{0}".format(unet.image_size[0] >> level)

    def block(place: Place) -> str:
        match place.part, place.resample:
            case "middle", _:
                return f"dec.{at(place.level)}_in{place.index}"
            case "encoder", "down":
                return f"enc.{at(place.level + 1)}_down"
            case "decoder", "up":
                return f"dec.{at(place.level - 1)}_up"
        return f"{place.part[:3]}.{at(place.level)}_block{place.index}"

    return Layout(
        ends={
            "time_mlp.0": "map_layer0",
            "time_mlp.2": "map_layer1",
            "label_embedding": "map_label",
            "conv_in": f"enc.{at(0)}_conv",
            "norm_out": f"dec.{at(0)}_aux_norm" if song else "out_norm",
            "conv_out": f"dec.{at(0)}_aux_conv" if song else "out_conv",
        },
        residual={
            "norm1": "norm0",
            "conv1": "conv0",
            "embed": "affine",
            "norm2": "norm1",
            "conv2": "conv1",
            "skip": "skip",
        },
        attention={"norm": "norm2", "qkv": "qkv", "project": "proj"},
        block=block,
        attends=block,
    )
