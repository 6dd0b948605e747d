"""`fastdiff import` of EDM's snapshots: pickles as EDM writes them, read without its code, and what is refused."""

import math
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import assert_refused, elsewhere, run  # noqa: F401
from published_networks import edm, edm_layers, edm_shapes, random_weights
from safetensors.torch import save_file
from torch import nn

from fastdiff import checkpoint, samplers
from fastdiff.denoiser import Guided

SONG = {
    "img_resolution": 16,
    "img_channels": 3,
    "label_dim": 0,
    "model_type": "SongUNet",
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "augment_dim": 9,
    "dropout": 0.13,
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
    "use_fp16": True,
}
ADM = {
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 6,
    "model_type": "DhariwalUNet",
    "model_channels": 64,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.1,
}
CASES = {
    "DDPM++": ("EDMPrecond", SONG),
    "DDPM++ with classes": ("EDMPrecond", SONG | {"label_dim": 5, "channel_mult": [2, 2], "attn_resolutions": [16]}),
    "DDPM++ with label dropout": ("EDMPrecond", SONG | {"label_dim": 5, "label_dropout": 0.1}),
    "ADM with classes": ("EDMPrecond", ADM),
    "ADM with label dropout": ("EDMPrecond", ADM | {"label_dropout": 0.1}),
    "VP": ("VPPrecond", SONG | {"epsilon_t": 1e-5, "beta_d": 19.1, "beta_min": 0.2}),
    "iDDPM": ("iDDPMPrecond", ADM | {"label_dim": 0}),
}


# --- A pickle as EDM writes it ------------------------------------------------------------------------------------


def reconstruct(meta):
    raise AssertionError("code of the pickle was run")


reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
reconstruct.__name__ = "_reconstruct_persistent_obj"


class Persistent(nn.Module):
    """A module that pickles as EDM's do: its class by name and source text, its state as a dictionary."""

    def __init__(self, kind: str, tensors=None, modules=None, **values):
        super().__init__()
        self.kind = kind
        for name, tensor in (tensors or {}).items():
            if name in ("resample_filter", "u"):
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor))
        for name, module in (modules or {}).items():
            self.add_module(name, module)
        self.__dict__.update(values)

    def __reduce__(self):
        state = {key: value for key, value in self.__dict__.items() if key != "kind"}
        source = "raise AssertionError('code of the pickle was run')"
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": self.kind, "state": state}
        return reconstruct, (meta,)


def layer(kind: str, weights: dict, name: str, **values) -> Persistent:
    tensors = {one: weights[f"{name}.{one}"] for one in ("weight", "bias") if f"{name}.{one}" in weights}
    return Persistent(kind, tensors, **values)


def conv(weights: dict, name: str, resample=None, filter_=0.25) -> Persistent:
    module = layer("Conv2d", weights, name, fused_resample=False)
    module.register_buffer("resample_filter", torch.full((1, 1, 2, 2), filter_) if resample else None)
    return module


def norm(weights: dict, name: str, eps: float) -> Persistent:
    channels = len(weights[f"{name}.weight"])
    return layer("GroupNorm", weights, name, num_groups=min(32, channels // 4), eps=eps)


def network(weights: dict, options: dict, **changes) -> Persistent:
    """The modules of SongUNet or DhariwalUNet with what their code computes with."""
    song, width = options["song"], options["model_channels"]
    eps = 1e-6 if song else 1e-5
    parts = {"enc": nn.ModuleDict(), "dec": nn.ModuleDict()}
    attending = {one.name for one in edm_layers(options) if one.kind == "attention"}
    for one in edm_layers(options):
        part, _, name = one.name.partition(".")
        if one.kind == "conv":
            parts[part][name] = conv(weights, one.name)
        elif one.kind == "block":
            heads = (1 if song else one.out // 64) if one.name in attending else 0
            inside = {
                "norm0": norm(weights, f"{one.name}.norm0", eps),
                "conv0": conv(weights, f"{one.name}.conv0", one.resample, changes.get("filter_", 0.25)),
                "affine": layer("Linear", weights, f"{one.name}.affine", in_features=4 * width),
                "norm1": norm(weights, f"{one.name}.norm1", eps),
                "conv1": conv(weights, f"{one.name}.conv1"),
            }
            if f"{one.name}.skip.weight" in weights or one.resample:
                inside["skip"] = conv(weights, f"{one.name}.skip", one.resample)
            if heads:
                inside["norm2"] = norm(weights, f"{one.name}.norm2", eps)
                inside |= {key: conv(weights, f"{one.name}.{key}") for key in ("qkv", "proj")}
            scale = changes.get("skip_scale", np.sqrt(0.5) if song else 1)
            plain = {"num_heads": heads, "skip_scale": scale, "adaptive_scale": not song, "out_channels": one.out}
            parts[part][name] = Persistent("UNetBlock", {}, inside, **plain)
    size = options["img_resolution"]
    ends = {}
    if song:
        parts["dec"][f"{size}x{size}_aux_norm"] = norm(weights, f"dec.{size}x{size}_aux_norm", eps)
        parts["dec"][f"{size}x{size}_aux_conv"] = conv(weights, f"dec.{size}x{size}_aux_conv")
    else:
        ends = {"out_norm": norm(weights, "out_norm", eps), "out_conv": conv(weights, "out_conv")}
    mapping = {"map_noise": Persistent("PositionalEmbedding", num_channels=width, max_positions=10000, endpoint=song)}
    for name in ("map_label", "map_augment", "map_layer0", "map_layer1"):
        if f"{name}.weight" in weights:
            mapping[name] = layer("Linear", weights, name)
    return Persistent(options["model_type"], {}, mapping | parts | ends, label_dropout=0)


def completed(kind: str, given: dict) -> dict:
    extra = {"song": given["model_type"] == "SongUNet", "variance": kind == "iDDPMPrecond", "augment_dim": 0}
    return extra | given


def table(steps: int = 1000) -> torch.Tensor:
    """iDDPM's σ from the noisiest step to none, by its formula."""

    def alpha_bar(j: int) -> float:
        return math.sin(0.5 * math.pi * j / steps / 1.008) ** 2

    u = [0.0]
    for j in range(steps, 0, -1):
        u.append(math.sqrt((u[-1] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), 0.001) - 1))
    return torch.tensor(u[::-1])


def snapshot(kind: str, given: dict, name: str = "snapshot.pkl", seed: int = 0, **changes) -> tuple[dict, dict]:
    options = completed(kind, given)
    weights = random_weights(edm_shapes(options), seed)
    tensors = {"u": changes.get("u", table())} if kind == "iDDPMPrecond" else {}
    arguments = {"_init_args": (), "_init_kwargs": given | changes.get("kwargs", {})}
    net = Persistent(kind, tensors, {"model": network(weights, options, **changes)}, sigma_data=0.5, **arguments)
    write(name, {"ema": net, "loss_fn": Persistent("EDMLoss"), "augment_pipe": None, "dataset_kwargs": {"path": "x"}})
    return weights, options


def write(name: str, content: object) -> None:
    """Pickle it while EDM's module can be found, which is gone when it is read."""
    modules = {name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence")}
    modules["torch_utils.persistence"]._reconstruct_persistent_obj = reconstruct
    sys.modules.update(modules)
    try:
        Path(name).write_bytes(pickle.dumps(content))
    finally:
        for module in modules:
            del sys.modules[module]


# --- What it computes, by the formulas of its preconditioners -----------------------------------------------------


def image(kind: str, weights: dict, options: dict, x, sigma, label) -> torch.Tensor:
    """EDM's D(x; σ)."""
    one_hot = None if label is None else nn.functional.one_hot(label, options["label_dim"] + 1)[:, :-1].float()
    s = sigma[:, None, None, None]
    if kind == "EDMPrecond":
        c_skip, c_out, c_in = 0.25 / (s**2 + 0.25), s * 0.5 / (s**2 + 0.25).sqrt(), 1 / (s**2 + 0.25).sqrt()
        return c_skip * x + c_out * edm(weights, options, c_in * x, sigma.log() / 4, one_hot)
    if kind == "VPPrecond":
        d, low = options["beta_d"], options["beta_min"]
        c_noise = 999 * ((low**2 + 2 * d * (1 + sigma.double() ** 2).log()).sqrt() - low) / d
    else:
        c_noise = 999 - (sigma[:, None] - table()[None]).abs().argmin(1)
    return x - s * edm(weights, options, x / (s**2 + 1).sqrt(), c_noise, one_hot)[:, :3]


def outputs(kind: str, weights: dict, options: dict, null: bool = False) -> dict:
    generator = torch.Generator().manual_seed(5)
    sigma = table()[[990, 700, 400, 30]] if kind == "iDDPMPrecond" else torch.tensor([0.05, 0.3, 2.0, 70.0])
    size, classes = options["img_resolution"], options["label_dim"]
    x = (1 + sigma[:, None, None, None]) * torch.randn(4, 3, size, size, generator=generator)
    label = (torch.arange(4) % classes if not null else torch.full((4,), classes)) if classes else None
    found = {"input": x, "time": sigma, "output": image(kind, weights, options, x, sigma, label).contiguous()}
    return found if label is None else found | {"label": label}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_published_network(run, case):  # noqa: F811
    kind, given = CASES[case]
    weights, options = snapshot(kind, given)
    theirs = outputs(kind, weights, options)
    save_file(theirs, "check.safetensors")
    result = run("import", "snapshot.pkl", "--check", "check.safetensors", "--out", "teacher")
    assert result.code == 0, result
    assert float(result.out.split("outputs at most ")[1].split()[0]) <= 2e-5
    assert ("map_augment.weight is dropped" in result.out) == bool(options["augment_dim"])
    teacher = checkpoint.load("teacher")
    sigma = theirs["time"].double()
    angle = torch.atan(sigma)
    z = (theirs["input"].double() * torch.cos(angle)[:, None, None, None]).float()
    with torch.no_grad():
        found = samplers.denoised(teacher, z, angle, theirs.get("label"), None)
    error = (found - theirs["output"]).abs().amax((1, 2, 3)) / theirs["output"].abs().amax((1, 2, 3))
    assert error.max() <= 2e-5, error
    assert teacher.config.unet.null_class == ("dropout" in case)


@pytest.mark.parametrize("case", ["DDPM++ with label dropout", "ADM with label dropout"])
def test_a_network_of_label_dropout_knows_the_null_class(run, case):  # noqa: F811
    kind, given = CASES[case]
    weights, options = snapshot(kind, given)
    assert run("import", "snapshot.pkl", "--out", "teacher").code == 0
    teacher = checkpoint.load("teacher")
    assert teacher.config.can_guide
    with_class, without = outputs(kind, weights, options), outputs(kind, weights, options, null=True)
    angle = torch.atan(with_class["time"].double())
    z = (with_class["input"].double() * torch.cos(angle)[:, None, None, None]).float()
    with torch.no_grad():
        found = samplers.denoised(Guided(teacher), z, angle, with_class["label"], torch.full((4,), 2.0))
    expected = 3 * with_class["output"] - 2 * without["output"]
    assert ((found - expected).abs().amax((1, 2, 3)) / expected.abs().amax((1, 2, 3))).max() <= 3e-5


REFUSED = {
    "VE": ("VEPrecond", SONG, {}, "VEPrecond"),
    "NCSN++": ("EDMPrecond", SONG, {"kwargs": {"embedding_type": "fourier"}}, "embedding_type is 'fourier'"),
    "residual encoder": ("EDMPrecond", SONG, {"kwargs": {"encoder_type": "residual"}}, "encoder_type"),
    "filter": ("EDMPrecond", SONG, {"kwargs": {"resample_filter": [1, 3, 3, 1]}}, "resample_filter"),
    "filter in the module": ("EDMPrecond", SONG, {"filter_": 0.2}, "another filter"),
    "factor": ("EDMPrecond", SONG, {"skip_scale": 1.0}, "skip_scale"),
    "sigma_data": ("EDMPrecond", SONG, {"kwargs": {"sigma_data": 1.0}}, "sigma_data"),
    "embedding": ("EDMPrecond", SONG, {"kwargs": {"channel_mult_emb": 2}}, "channel_mult_emb"),
    "model_type": ("EDMPrecond", SONG, {"kwargs": {"model_type": "Mine"}}, "model_type"),
    "unknown": ("EDMPrecond", SONG, {"kwargs": {"rotary": True}}, "rotary"),
    "blocks": ("EDMPrecond", SONG, {"kwargs": {"num_blocks": 2}}, "enc.16x16_block1"),
    "classes": ("EDMPrecond", SONG, {"kwargs": {"label_dim": 3}}, "map_label.weight"),
    "table that rises": ("iDDPMPrecond", ADM, {"u": table().flip(0)}, "falls"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_to_be_right_is_refused(run, case, tmp_path):  # noqa: F811
    kind, given, changes, said = REFUSED[case]
    snapshot(kind, given, **changes)
    assert_refused(run("import", "snapshot.pkl", "--out", "teacher"), said)
    assert not (tmp_path / "teacher").exists()


class Calls:
    """Whatever is to be called when it is read."""

    def __init__(self, function, *arguments, state=None):
        self.made = (function, arguments, state) if state is not None else (function, arguments)

    def __reduce__(self):
        return self.made


def hostile() -> dict:
    folder = Calls(os.mkdir, "ran")
    weights = Persistent("EDMPrecond", {}, {}, _init_args=(), _init_kwargs=dict(SONG))
    weights.__dict__["_parameters"] = {"weight": folder}
    arguments = Persistent("EDMPrecond", {}, {}, _init_args=(), _init_kwargs=SONG | {"label_dim": folder})
    arguments.add_module("model", Persistent("SongUNet"))
    modules = Persistent("EDMPrecond", {}, {}, _init_args=(), _init_kwargs=dict(SONG))
    modules.__dict__["_modules"] = {"model": folder}
    return {
        "at the top": folder,
        "as the network": {"ema": folder},
        "as a tensor": {"ema": weights},
        "as a number": {"ema": arguments},
        "as a module": {"ema": modules},
        "as code": {"ema": Calls(eval, "__import__('os').mkdir('ran')")},
        "as other code": {"ema": Calls(exec, "import os; os.mkdir('ran')")},
        "as a tensor's memory": {"ema": Calls(torch.storage._load_from_bytes, pickle.dumps(folder))},
        "as numbers of objects": {"ema": Calls(np.dtype, "O")},
        "numbers": {"ema": 3},
        "a list": [1, 2],
    }


@pytest.mark.parametrize("case", hostile())
def test_no_code_of_a_pickle_is_run(run, case, tmp_path):  # noqa: F811
    write("snapshot.pkl", hostile()[case])
    assert_refused(run("import", "snapshot.pkl", "--out", "teacher"), "snapshot.pkl")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "teacher").exists()


def test_damaged_and_foreign_files(run, tmp_path):  # noqa: F811
    snapshot("EDMPrecond", SONG)
    whole = Path("snapshot.pkl").read_bytes()
    for content in (whole[:-50], whole[: len(whole) // 2], b"", b"hello", b"\x80\x04."):
        Path("snapshot.pkl").write_bytes(content)
        assert_refused(run("import", "snapshot.pkl", "--out", "teacher"), "snapshot.pkl", "damaged")
    assert not (tmp_path / "teacher").exists()


def test_noise_levels_of_a_table_have_to_be_its_own(run):  # noqa: F811
    weights, options = snapshot("iDDPMPrecond", ADM)
    theirs = outputs("iDDPMPrecond", weights, options)
    save_file(theirs | {"time": theirs["time"] * 1.01}, "check.safetensors")
    assert_refused(run("import", "snapshot.pkl", "--check", "check.safetensors", "--out", "teacher"), "round_sigma")
