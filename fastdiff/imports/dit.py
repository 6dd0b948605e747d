"""diffusers' DiTTransformer2DModel as our DiT."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import dit
from fastdiff.errors import UserError
from fastdiff.imports.account import Settings, Tensors
from fastdiff.unet import UNetConfig

NETWORK = "dit"
DEFAULTS = {  # for settings that are not written down
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}
OF_OTHERS = {  # settings of older versions' Transformer2DModel, which was several networks, by their value for a DiT
    "cross_attention_dim": None,
    "double_self_attention": False,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": False,
}
DECIDED_BY = (
    ("class_embedder", "num_embeds_ada_norm"),
    ("pos_embed", "patch_size, in_channels or sample_size"),
    ("proj_out_2", "out_channels or patch_size"),
    ("", "num_layers, num_attention_heads or attention_head_dim"),
)
LAYERS = {  # of a block, by our names
    "time_mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "time_mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "label_embedding": "norm1.emb.class_embedder.embedding_table",
    "modulate": "norm1.linear",
    "attended": "attn1.to_out.0",
    "widen": "ff.net.0.proj",
    "narrow": "ff.net.2",
}
ENDS = {"patches": "pos_embed.proj", "modulate": "proj_out_1", "project": "proj_out_2"}


def read(
    settings: Settings, tensors: Tensors, *, learned: bool, null_class: bool
) -> tuple[UNetConfig, dict[str, Tensor]]:
    """The DiT and its weights. Raises UserError for what it cannot be.

    learned: whether the scheduler says that half of the outputs predict the variance, which DiT's own does not say.
    """
    if null_class:
        raise UserError("--null-class is of U-Nets: a DiT's null class is beside those that it counts; leave it out")
    settings.ignore("norm_num_groups")  # it has no such norm
    for name, value in OF_OTHERS.items():
        if name in settings:
            settings.expect(name, value)
    for name in ("attention_bias", "activation_fn", "upcast_attention", "norm_type", "norm_elementwise_affine"):
        settings.expect(name, DEFAULTS[name])
    size, channels, heads = (settings.whole(name) for name in ("sample_size", "in_channels", "num_attention_heads"))
    config = UNetConfig(
        (size, size),
        channels,
        settings.whole("num_embeds_ada_norm"),
        channels=heads * settings.whole("attention_head_dim"),
        blocks=settings.whole("num_layers"),
        heads=heads,
        patch_size=settings.whole("patch_size"),
        dropout=settings.number("dropout"),
        eps=settings.number("norm_eps"),
        time_scale=1.0,
    )
    outputs = channels if settings["out_channels"] is None else settings.whole("out_channels")
    if outputs not in (channels, 2 * channels) or (learned and outputs == channels):
        raise settings.refuse("out_channels", f"{2 * channels if learned else f'{channels} or {2 * channels}'} here")
    try:
        with torch.device("meta"):
            net = dit.DiT(config)
    except ValueError as error:
        raise UserError(f"{settings.place} describes a network that fastdiff's DiT cannot be: {error}") from None
    _check_positions(tensors, config)
    found = {name: _weight(name, tuple(p.shape), tensors, outputs // channels) for name, p in net.named_parameters()}
    return config, found


def _weight(name: str, shape: tuple[int, ...], tensors: Tensors, parts: int) -> Tensor:
    """A weight of ours; parts: 2 where half of the outputs predict the variance."""
    layer, _, kind = name.rpartition(".")
    if layer == "project":
        return _outputs(tensors, f"proj_out_2.{kind}", shape, parts)
    if not layer.startswith("blocks."):
        return tensors.take(f"{ENDS[layer]}.{kind}", shape)
    _, number, inner = layer.split(".", 2)
    block = f"transformer_blocks.{number}"
    if inner == "qkv":
        each = (shape[0] // 3, *shape[1:])
        return torch.cat([tensors.take(f"{block}.attn1.to_{part}.{kind}", each) for part in "qkv"])
    return tensors.take(f"{block}.{LAYERS[inner]}.{kind}", shape)


def _outputs(tensors: Tensors, theirs: str, shape: tuple[int, ...], parts: int) -> Tensor:
    """The last layer's, whose rows are there by pixel of a patch and then by channel, here by channel first."""
    weight = tensors.take(theirs, (parts * shape[0], *shape[1:]))
    if parts == 2:
        tensors.note(f"half of {theirs}", "it predicts the variance of DDPM's steps, which fastdiff does not use")
    channels = parts * tensors.shape("pos_embed.proj.weight")[1]
    by_channel = weight.unflatten(0, (-1, channels)).transpose(0, 1)
    return by_channel[: channels // parts].flatten(0, 1).contiguous()


def _check_positions(tensors: Tensors, config: UNetConfig) -> None:
    """What a file holds of the positions, which are computed. Raises UserError where they are others."""
    name = "pos_embed.pos_embed"
    if name in tensors:
        ours = dit.positions(config.image_size[0] // config.patch_size, config.channels)
        if not torch.allclose(tensors.take(name, tuple(ours.shape)), ours, atol=1e-5):
            raise UserError(f"{tensors.place}: {name} holds other positions than a DiT's: it cannot be imported")
