"""ADM and DDPM++ in plain operations, by the names under which their authors publish the weights.

Nothing here knows of fastdiff's networks. A network is a list of its layers in order, from which come the shapes of its
weights (`random_weights`) and its output.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Layer(NamedTuple):
    kind: str
    """block, attention, conv (with stride for "down", after doubling for "up"), or push and pop of skips."""
    name: str = ""
    channels: int = 0
    out: int = 0
    resample: str | None = None


Weights = dict[str, Tensor]


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Weights:
    """Matrices that keep variance about 1, norms about 1, and small biases."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and name.endswith("weight")
        made[name] = noise / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else is_norm + 0.2 * noise
    return made


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    bias = w.get(f"{name}.bias")
    return x @ w[f"{name}.weight"].T + (0 if bias is None else bias)


def conv(w: Weights, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = w[f"{name}.weight"]
    weight = weight if weight.ndim == 4 else weight[..., None]
    return F.conv2d(x, weight, w[f"{name}.bias"], stride=stride, padding=weight.shape[-1] // 2)


def norm(w: Weights, name: str, x: Tensor, groups: int, eps: float) -> Tensor:
    grouped = x.reshape(len(x), groups, -1)
    variance, mean = torch.var_mean(grouped, dim=2, keepdim=True, correction=0)
    normal = ((grouped - mean) / torch.sqrt(variance + eps)).reshape(x.shape)
    return normal * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def resized(x: Tensor, resample: str | None) -> Tensor:
    if resample == "down":
        return x.unflatten(3, (-1, 2)).mean(4).unflatten(2, (-1, 2)).mean(3)
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if resample == "up" else x


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(rows, width, pixels) each."""
    return v @ torch.softmax(q.mT @ k / math.sqrt(q.shape[1]), dim=2).mT


# --- guided-diffusion ---------------------------------------------------------------------------------------------


def adm_layers(flags: dict) -> list[Layer]:
    """Of guided-diffusion's network; attention at the levels where the image is smaller by one of the factors."""
    multipliers, width, blocks = flags["multipliers"], flags["num_channels"], flags["num_res_blocks"]
    factors = {flags["image_size"] // int(one) for one in flags["attention_resolutions"].split(",")}
    channels = int(multipliers[0] * width)
    layers, skips, index = [Layer("conv", "input_blocks.0.0", 3, channels), Layer("push")], [channels], 1
    changing = "block" if flags["resblock_updown"] else "conv"
    for level, multiplier in enumerate(multipliers):
        for _ in range(blocks):
            out = int(multiplier * width)
            layers.append(Layer("block", f"input_blocks.{index}.0", channels, out))
            channels, index = out, index + 1
            if 2**level in factors:
                layers.append(Layer("attention", f"input_blocks.{index - 1}.1", channels))
            layers.append(Layer("push"))
            skips.append(channels)
        if level < len(multipliers) - 1:
            name = f"input_blocks.{index}.0" + (".op" if changing == "conv" else "")
            layers += [Layer(changing, name, channels, channels, "down"), Layer("push")]
            skips.append(channels)
            index += 1
    layers.append(Layer("block", "middle_block.0", channels, channels))
    layers.append(Layer("attention", "middle_block.1", channels))
    layers.append(Layer("block", "middle_block.2", channels, channels))
    index = 0
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for block in range(blocks + 1):
            out = int(multiplier * width)
            layers += [Layer("pop"), Layer("block", f"output_blocks.{index}.0", channels + skips.pop(), out)]
            channels, inside = out, 1
            if 2**level in factors:
                layers.append(Layer("attention", f"output_blocks.{index}.1", channels))
                inside = 2
            if level and block == blocks:
                name = f"output_blocks.{index}.{inside}" + (".conv" if changing == "conv" else "")
                layers.append(Layer(changing, name, channels, channels, "up"))
            index += 1
    return layers


def adm_shapes(flags: dict) -> dict[str, tuple[int, ...]]:
    width, layers = flags["num_channels"], adm_layers(flags)
    embed, found = 4 * width, {}

    def add(name: str, *shape: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]

    add("time_embed.0", embed, width)
    add("time_embed.2", embed, embed)
    if flags["class_cond"]:
        found["label_emb.weight"] = (flags["classes"], embed)
    for layer in layers:
        if layer.kind == "conv":
            add(layer.name, layer.out, layer.channels, 3, 3)
        elif layer.kind == "attention":
            add(f"{layer.name}.norm", layer.channels)
            add(f"{layer.name}.qkv", 3 * layer.channels, layer.channels, 1)
            add(f"{layer.name}.proj_out", layer.channels, layer.channels, 1)
        elif layer.kind == "block":
            add(f"{layer.name}.in_layers.0", layer.channels)
            add(f"{layer.name}.in_layers.2", layer.out, layer.channels, 3, 3)
            add(f"{layer.name}.emb_layers.1", layer.out * (2 if flags["use_scale_shift_norm"] else 1), embed)
            add(f"{layer.name}.out_layers.0", layer.out)
            add(f"{layer.name}.out_layers.3", layer.out, layer.out, 3, 3)
            if layer.out != layer.channels:
                add(f"{layer.name}.skip_connection", layer.out, layer.channels, 1, 1)
    add("out.0", layers[-1].out or layers[-1].channels)
    add("out.2", 6 if flags["learn_sigma"] else 3, layers[0].out, 3, 3)
    return found


def adm(w: Weights, flags: dict, x: Tensor, step: Tensor, label: Tensor | None) -> Tensor:
    """guided-diffusion's network at a step that is already rescaled, if it is to be."""
    half = flags["num_channels"] // 2
    phase = step[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
    e = linear(w, "time_embed.0", torch.cat([phase.cos(), phase.sin()], 1))
    e = linear(w, "time_embed.2", F.silu(e))
    e = F.silu(e if label is None else e + w["label_emb.weight"][label])
    skips = []
    for layer in adm_layers(flags):
        match layer.kind:
            case "push":
                skips.append(x)
            case "pop":
                x = torch.cat([x, skips.pop()], 1)
            case "conv":
                x = conv(w, layer.name, resized(x, layer.resample if layer.resample == "up" else None),
                         2 if layer.resample == "down" else 1)  # fmt: skip
            case "attention":
                x = x + _adm_attention(w, layer.name, flags, x)
            case "block":
                x = _adm_block(w, layer, flags, x, e)
    return conv(w, "out.2", F.silu(norm(w, "out.0", x, 32, 1e-5)))


def _adm_block(w: Weights, layer: Layer, flags: dict, x: Tensor, e: Tensor) -> Tensor:
    h = resized(F.silu(norm(w, f"{layer.name}.in_layers.0", x, 32, 1e-5)), layer.resample)
    h = conv(w, f"{layer.name}.in_layers.2", h)
    modulation = linear(w, f"{layer.name}.emb_layers.1", e)[:, :, None, None]
    if flags["use_scale_shift_norm"]:
        scale, shift = modulation.chunk(2, 1)
        h = norm(w, f"{layer.name}.out_layers.0", h, 32, 1e-5) * (1 + scale) + shift
    else:
        h = norm(w, f"{layer.name}.out_layers.0", h + modulation, 32, 1e-5)
    h = conv(w, f"{layer.name}.out_layers.3", F.silu(h))
    x = resized(x, layer.resample)
    return h + (conv(w, f"{layer.name}.skip_connection", x) if f"{layer.name}.skip_connection.weight" in w else x)


def _adm_attention(w: Weights, name: str, flags: dict, x: Tensor) -> Tensor:
    batch, channels, *size = x.shape
    fixed = flags["num_head_channels"]
    heads = flags["num_heads"] if fixed == -1 else channels // fixed
    qkv = conv(w, f"{name}.qkv", norm(w, f"{name}.norm", x, 32, 1e-5)).flatten(2)
    if flags["use_new_attention_order"]:  # q, k and v first, heads within
        q, k, v = (part.reshape(batch * heads, channels // heads, -1) for part in qkv.chunk(3, 1))
    else:
        q, k, v = qkv.reshape(batch * heads, 3 * channels // heads, -1).chunk(3, 1)
    return conv(w, f"{name}.proj_out", attend(q, k, v).reshape(batch, channels, *size))


# --- EDM ----------------------------------------------------------------------------------------------------------


def edm_layers(options: dict) -> list[Layer]:
    """Of EDM's DDPM++ (song) and ADM; a block's out is followed by its attention, in the same module."""
    song, width, blocks = options["song"], options["model_channels"], options["num_blocks"]
    multipliers, size = options["channel_mult"], options["img_resolution"]
    channels = width if song else width * multipliers[0]
    layers = [Layer("conv", f"enc.{size}x{size}_conv", options["img_channels"], channels), Layer("push")]
    skips = [channels]

    def block(name: str, out: int, attention: bool, into: int | None = None, resample: str | None = None) -> None:
        nonlocal channels
        layers.append(Layer("block", name, channels if into is None else into, out, resample))
        channels = out
        if attention:
            layers.append(Layer("attention", name, out))

    for level, multiplier in enumerate(multipliers):
        now = size >> level
        if level:
            block(f"enc.{now}x{now}_down", channels, False, resample="down")
            layers.append(Layer("push"))
            skips.append(channels)
        for index in range(blocks):
            block(f"enc.{now}x{now}_block{index}", width * multiplier, now in options["attn_resolutions"])
            layers.append(Layer("push"))
            skips.append(channels)
    for level, multiplier in reversed(list(enumerate(multipliers))):
        now = size >> level
        if level == len(multipliers) - 1:
            block(f"dec.{now}x{now}_in0", channels, True)
            block(f"dec.{now}x{now}_in1", channels, False)
        else:
            block(f"dec.{now}x{now}_up", channels, False, resample="up")
        for index in range(blocks + 1):
            attention = now in options["attn_resolutions"] and (index == blocks or not song)
            layers.append(Layer("pop"))
            block(f"dec.{now}x{now}_block{index}", width * multiplier, attention, channels + skips.pop())
    return layers


def edm_shapes(options: dict) -> dict[str, tuple[int, ...]]:
    song, width, size = options["song"], options["model_channels"], options["img_resolution"]
    embed, found, outputs = 4 * width, {}, options["img_channels"] * (2 if options.get("variance") else 1)

    def add(name: str, *shape: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]

    if options["label_dim"] and song:
        add("map_label", width, options["label_dim"])
    elif options["label_dim"]:
        found["map_label.weight"] = (embed, options["label_dim"])
    if options["augment_dim"]:
        found["map_augment.weight"] = (width, options["augment_dim"])
    add("map_layer0", embed, width)
    add("map_layer1", embed, embed)
    for layer in edm_layers(options):
        if layer.kind == "conv":
            add(layer.name, layer.out, layer.channels, 3, 3)
        elif layer.kind == "attention":
            add(f"{layer.name}.norm2", layer.channels)
            add(f"{layer.name}.qkv", 3 * layer.channels, layer.channels, 1, 1)
            add(f"{layer.name}.proj", layer.channels, layer.channels, 1, 1)
        elif layer.kind == "block":
            add(f"{layer.name}.norm0", layer.channels)
            add(f"{layer.name}.conv0", layer.out, layer.channels, 3, 3)
            add(f"{layer.name}.affine", layer.out * (1 if song else 2), embed)
            add(f"{layer.name}.norm1", layer.out)
            add(f"{layer.name}.conv1", layer.out, layer.out, 3, 3)
            if layer.out != layer.channels or (song and layer.resample):
                add(f"{layer.name}.skip", layer.out, layer.channels, 1, 1)
    last = width * options["channel_mult"][0]
    names = (f"dec.{size}x{size}_aux_norm", f"dec.{size}x{size}_aux_conv") if song else ("out_norm", "out_conv")
    add(names[0], last)
    add(names[1], outputs, last, 3, 3)
    return found


def edm(w: Weights, options: dict, x: Tensor, c_noise: Tensor, one_hot: Tensor | None) -> Tensor:
    """EDM's F of its input, c_noise and one-hot labels."""
    song, half = options["song"], options["model_channels"] // 2
    eps = 1e-6 if song else 1e-5
    phase = c_noise[:, None].float() * 10000.0 ** (-torch.arange(half) / (half - (1 if song else 0)))
    e = torch.cat([phase.sin(), phase.cos()] if song else [phase.cos(), phase.sin()], 1)
    if one_hot is not None and song:
        e = e + linear(w, "map_label", one_hot * math.sqrt(options["label_dim"]))
    e = linear(w, "map_layer1", F.silu(linear(w, "map_layer0", e)))
    if one_hot is not None and not song:
        e = e + linear(w, "map_label", one_hot)
    e = F.silu(e)
    skips = []
    for layer in edm_layers(options):
        match layer.kind:
            case "push":
                skips.append(x)
            case "pop":
                x = torch.cat([x, skips.pop()], 1)
            case "conv":
                x = conv(w, layer.name, x)
            case "attention":
                x = _edm_attention(w, layer.name, options, x, eps)
            case "block":
                x = _edm_block(w, layer, options, x, e, eps)
    size = options["img_resolution"]
    names = (f"dec.{size}x{size}_aux_norm", f"dec.{size}x{size}_aux_conv") if song else ("out_norm", "out_conv")
    return conv(w, names[1], F.silu(norm(w, names[0], x, min(32, x.shape[1] // 4), eps)))


def _edm_block(w: Weights, layer: Layer, options: dict, x: Tensor, e: Tensor, eps: float) -> Tensor:
    groups = [min(32, channels // 4) for channels in (layer.channels, layer.out)]
    h = resized(F.silu(norm(w, f"{layer.name}.norm0", x, groups[0], eps)), layer.resample)
    h = conv(w, f"{layer.name}.conv0", h)
    modulation = linear(w, f"{layer.name}.affine", e)[:, :, None, None]
    if options["song"]:
        h = norm(w, f"{layer.name}.norm1", h + modulation, groups[1], eps)
    else:
        scale, shift = modulation.chunk(2, 1)
        h = norm(w, f"{layer.name}.norm1", h, groups[1], eps) * (1 + scale) + shift
    h = conv(w, f"{layer.name}.conv1", F.silu(h))
    x = resized(x, layer.resample)
    x = h + (conv(w, f"{layer.name}.skip", x) if f"{layer.name}.skip.weight" in w else x)
    return x * math.sqrt(0.5) if options["song"] else x


def _edm_attention(w: Weights, name: str, options: dict, x: Tensor, eps: float) -> Tensor:
    batch, channels, *size = x.shape
    heads = 1 if options["song"] else channels // 64
    qkv = conv(w, f"{name}.qkv", norm(w, f"{name}.norm2", x, min(32, channels // 4), eps))
    q, k, v = qkv.reshape(batch * heads, channels // heads, 3, -1).unbind(2)
    x = x + conv(w, f"{name}.proj", attend(q, k, v).reshape(batch, channels, *size))
    return x * math.sqrt(0.5) if options["song"] else x
