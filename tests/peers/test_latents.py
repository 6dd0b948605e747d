"""Models that work in the latents of a VAE: diffusers' AutoencoderKL and DiT, through every recipe and command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import assert_refused, elsewhere, run, write_images  # noqa: F401
from common import save_model
from PIL import Image
from safetensors.torch import load_file, save_file

from fastdiff import checkpoint, data
from fastdiff.data import Latents
from fastdiff.denoiser import DenoiserConfig
from fastdiff.generate import Sampling, generate
from fastdiff.unet import UNetConfig
from fastdiff.vae import Vae

diffusers = pytest.importorskip("diffusers")

FEW = ("--updates", 2, "--batch-size", 8, "--device", "cpu")
ROUNDS = ("--start-steps", 4, "--end-steps", 2)
SHAPE = UNetConfig((4, 4), 3, 10, channels=8, channel_mult=(1,), blocks=1, head_width=8)


def save_vae(folder, *, scale=0.5, **changes) -> "diffusers.AutoencoderKL":
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    net = diffusers.AutoencoderKL(
        **{"in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "norm_num_groups": 4}
        | {"latent_channels": 3, "scaling_factor": scale, "sample_size": 8}
        | blocks
        | changes
    )
    net.save_pretrained(folder)
    return net.eval()


def save_pipeline(folder) -> None:
    torch.manual_seed(0)
    shape = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "out_channels": 6, "num_layers": 1}
    net = diffusers.DiTTransformer2DModel(**shape, sample_size=4, patch_size=2, num_embeds_ada_norm=10)
    parts = {"transformer": net, "vae": save_vae("unused"), "scheduler": diffusers.DDIMScheduler()}
    diffusers.DiTPipeline(**parts).save_pretrained(folder)


def save_latents(path="latents.safetensors", *, scale: str | None = "0.5", count=16, **tensors) -> None:
    found = {"latents": torch.randn(count, 3, 4, 4), "labels": torch.arange(count) % 10} | tensors
    save_file(found, path, metadata=None if scale is None else {"scale": scale})


def test_latents_are_those_of_diffusers(run):  # noqa: F811
    net = save_vae("vae", shift_factor=0.25)
    result = run("latents", "--vae", "vae", "--data", "digits", "--no-draw", "--device", "cpu")
    assert result.code == 0 and "latents of 3×4×4" in result.out, result
    found, digits = data.load("latents.safetensors"), data.load("digits")
    assert found.shape == (3, 4, 4) and found.class_names == digits.class_names
    assert np.array_equal(found.labels, digits.labels) and found.latents.scale == 0.5
    images = data.to_float(torch.from_numpy(digits.images[:20]))
    with torch.no_grad():
        code = net.encode(images).latent_dist
        torch.testing.assert_close(torch.from_numpy(found.images[:20]), (code.mean - 0.25) * 0.5)
        expected = net.decode(code.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(
        Vae(Path("vae")).decode(torch.from_numpy(found.images[:20])), expected, atol=1e-5, rtol=1e-4
    )
    line = ("latents", "--vae", "vae", "--data", "digits", "--device", "cpu", "--seed", 1)
    assert run(*line, "--out", "a.safetensors").code == 0
    assert run(*line, "--out", "b.safetensors", "--batch-size", 50).code == 0
    one, other = (load_file(f"{name}.safetensors")["latents"] for name in "ab")
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    spread = (one[:20] / 0.5 + 0.25 - code.mean) / code.std
    assert 0.9 < spread.std() < 1.1 and abs(spread.mean()) < 0.1


def test_a_dit_goes_through_everything(run):  # noqa: F811
    save_pipeline("pipeline")
    imported = run("import", "pipeline", "--out", "teacher")
    assert imported.code == 0 and "3×4×4 latents (of a VAE, scaled by 0.5)" in imported.out, imported
    assert run("latents", "--vae", "pipeline", "--data", "digits", "--device", "cpu").code == 0
    given = (*FEW, "--data", "latents.safetensors", "--vae", "pipeline")
    decoded = ("--vae", "pipeline", "--device", "cpu")
    pair = ("--encoder", "encoder/steps-2", "--decoder", "stage2/steps-2")
    for line in (
        ("stage1", *given, "--teacher", "teacher", "--out", "stage1"),
        ("stage2", *given, *ROUNDS, "--teacher", "stage1", "--out", "stage2"),
        ("encoder", *given, *ROUNDS, "--teacher", "stage1", "--out", "encoder"),
        ("sid", *FEW, "--teacher", "stage1", "--vae", "pipeline", "--score-num", 8, "--out", "sid"),
        ("sample", "--checkpoint", "stage2/steps-2", *decoded, "--num", 4, "--out", "out"),
        ("translate", *pair, *decoded, "--images", "out", "--from-label", 0, "--to-label", 1),
    ):
        result = run(*line)
        assert result.code == 0, (line, result)
    assert all(Image.open(path).size == (8, 8) for path in Path("out").glob("*.png"))
    assert {path.name for path in Path("stage1").glob("*.png")} == {"samples-stage1-0000002.png"}
    for name in ("stage1", "stage2/steps-2", "encoder/steps-2", "sid"):
        assert checkpoint.load(name).config.latents == checkpoint.load("teacher").config.latents != None  # noqa: E711
    refused = run("sample", "--checkpoint", "sid", "--num", 2, "--device", "cpu", "--out", "g.png")
    assert_refused(refused, "latents", "--vae")


def test_evaluate_decodes(run, monkeypatch):  # noqa: F811
    monkeypatch.setattr("fastdiff.metrics._train", lambda *_: 0.5)  # any features will do
    save_vae("vae")
    save_model(Path("model"), unet=SHAPE, latents=Latents(0.5))
    line = ("evaluate", "--checkpoint", "model", "--num", 20, "--steps", 2, "--device", "cpu")
    assert run(*line, "--vae", "vae").code == 0
    assert json.loads(Path("results.json").read_text())["rows"][0]["fd"] > 0
    assert_refused(run(*line, "--overwrite"), "--vae")
    save_latents()
    assert_refused(run(*line, "--vae", "vae", "--overwrite", "--data", "latents.safetensors"), "holds latents")
    one_level = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    save_vae("coarse", block_out_channels=(8,), **one_level)
    assert_refused(run(*line, "--vae", "coarse", "--overwrite"), "1×8×8", "1×4×4")


def test_a_teacher_of_latents_is_trained_and_never_clipped(run):  # noqa: F811
    save_latents(latents=3 + torch.randn(16, 3, 4, 4))
    shape = ("--unet.channels", 8, "--unet.channel-mult", 1, "--unet.blocks", 1, "--unet.head-width", 8)
    line = ("teacher", *FEW, *shape, "--data", "latents.safetensors", "--out", "teacher")
    assert run(*line).code == 0
    model = checkpoint.load("teacher")
    assert model.config.latents == Latents(0.5) and model.config.limit is None and not [*Path("teacher").glob("*.png")]
    clipped, free = (next(generate(model, 4, Sampling(steps=2, clip=clip))) for clip in (True, False))
    assert torch.equal(clipped, free) and DenoiserConfig.from_dict(model.config.to_dict()) == model.config
    assert_refused(run(*line, "--flip", "--overwrite"), "--flip")
    save_latents("other.safetensors", scale="0.25")
    small = ("stage1", *FEW, "--teacher", "teacher", "--out", "stage1")
    assert_refused(run(*small, "--data", "other.safetensors"), "0.25", "0.5")
    write_images(Path("pixels"), size=(4, 4), classes=[f"{k}" for k in range(10)], count=20)
    assert_refused(run(*small, "--data", "pixels"), "holds images", "latents")


@pytest.mark.parametrize(
    ("tensors", "scale", "parts"),
    [
        ({}, None, ("does not say how", "scale")),
        ({}, "-1", ("scale '-1'", "positive")),
        ({"latents": torch.zeros(16, 3, 4)}, "0.5", ("(N, C, H, W)",)),
        ({"latents": torch.zeros(16, 3, 4, 4, dtype=torch.uint8)}, "0.5", ("uint8",)),
        ({"latents": torch.full((16, 3, 4, 4), torch.nan)}, "0.5", ("finite",)),
        ({"extra": torch.zeros(1)}, "0.5", ("extra",)),
        ({"labels": torch.arange(15)}, "0.5", ("labels",)),
    ],
)
def test_files_that_are_refused(run, tensors, scale, parts):  # noqa: F811
    save_latents(scale=scale, **tensors)
    line = ("teacher", *FEW, "--data", "latents.safetensors", "--out", "teacher")
    assert_refused(run(*line), "latents", *parts)
    Path("latents.safetensors").write_bytes(b"no file of tensors")
    assert_refused(run(*line), "latents.safetensors", "damaged")
    assert not Path("teacher").exists()


def test_vaes_that_are_refused(run):  # noqa: F811
    save_model(Path("model"), unet=SHAPE, latents=Latents(0.5, vae="another"))
    save_model(Path("pixels"))
    save_vae("vae")
    save_vae("other", scale=0.25)
    save_vae("wide", latent_channels=4)
    save_vae("apart", latents_mean=[0.0, 0.0, 0.0])
    diffusers.DDIMScheduler().save_pretrained("scheduler")
    Path("vq").mkdir()
    Path("vq/config.json").write_text('{"_class_name": "VQModel"}')
    draw = ("sample", "--num", 2, "--steps", 1, "--device", "cpu", "--checkpoint")
    assert_refused(run(*draw, "model", "--vae", "other"), "0.25", "0.5")
    assert_refused(run(*draw, "model", "--vae", "wide"), "4", "3")
    assert_refused(run(*draw, "model", "--vae", "apart"), "latents_mean")
    assert_refused(run(*draw, "model", "--vae", "vq"), "VQModel")
    assert_refused(run(*draw, "model", "--vae", "nowhere"), "config.json")
    assert_refused(run(*draw, "pixels", "--vae", "vae"), "leave the option out")
    assert_refused(run("latents", "--vae", "vae", "--data", str(write_images(Path("rgb")))), "channels")
    result = run(*draw, "model", "--vae", "vae")
    assert result.code == 0 and "other weights" in result.err
