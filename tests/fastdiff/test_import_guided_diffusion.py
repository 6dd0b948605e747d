"""`fastdiff import` of guided-diffusion's files: its layout by the published names, its flags, and what is refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from command_lines import assert_refused, elsewhere, run  # noqa: F401
from published_networks import adm, adm_shapes, random_weights
from safetensors.torch import save_file

from fastdiff import checkpoint
from fastdiff.imports.guided_diffusion import read_flags

FLAGS = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "num_heads": 4,
    "num_head_channels": -1,
    "attention_resolutions": "8",
    "class_cond": True,
    "learn_sigma": True,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "use_new_attention_order": False,
    "noise_schedule": "cosine",
    "diffusion_steps": 1000,
    "rescale_timesteps": False,
}
CASES = {
    "fixed heads, old order": {},
    "head width, new order": {"num_head_channels": 16, "use_new_attention_order": True, "num_res_blocks": 2},
    "convolutions, added embedding": {"resblock_updown": False, "use_scale_shift_norm": False, "learn_sigma": False},
    "no classes, linear, few steps": {
        "class_cond": False,
        "noise_schedule": "linear",
        "diffusion_steps": 250,
        "rescale_timesteps": True,
    },
    "half a width": {"num_channels": 64, "channel_mult": "0.5,1,1", "attention_resolutions": "16,4", "dropout": 0.1},
}


def written(flags: dict, name: str = "adm.pt", seed: int = 0) -> tuple[dict, dict]:
    """The file of weights, and what the plain network needs."""
    plain = flags | {"multipliers": tuple(float(one) for one in flags["channel_mult"].split(",")), "classes": 7}
    weights = random_weights(adm_shapes(plain), seed)
    torch.save(weights, name)
    Path("flags.json").write_text(json.dumps(flags))
    return weights, plain


def outputs(weights: dict, plain: dict, steps=(0, 120, 249)) -> dict:
    generator = torch.Generator().manual_seed(3)
    z, step = torch.randn(3, 3, 16, 16, generator=generator), torch.tensor(steps)
    label = torch.tensor([0, 6, 3]) if plain["class_cond"] else None
    scaled = step * 1000 / plain["diffusion_steps"] if plain["rescale_timesteps"] else step
    found = {"input": z, "time": step, "output": adm(weights, plain, z, scaled, label)}
    return found if label is None else found | {"label": label}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_published_network(run, case):  # noqa: F811
    flags = FLAGS | CASES[case]
    weights, plain = written(flags)
    theirs = outputs(weights, plain)
    save_file(theirs, "check.safetensors")
    result = run("import", "adm.pt", "--flags", "flags.json", "--check", "check.safetensors", "--out", "teacher")
    assert result.code == 0, result
    assert float(result.out.split("outputs at most ")[1].split()[0]) <= 2e-5
    assert ("half of out.2.weight is dropped" in result.out) == flags["learn_sigma"]
    teacher = checkpoint.load("teacher")
    assert teacher.config.unet.null_class is False and teacher.config.unconditional is None
    with torch.no_grad():
        angle = teacher.schedule.angles()[theirs["time"]]
        found = teacher.network_output(theirs["input"], angle, theirs.get("label"), None)
    expected = theirs["output"][:, :3]
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert (found.flip(0) - expected).abs().max() > 1e-2 * expected.abs().max()


def test_flags_as_text_as_pairs_and_as_json():
    Path("published.txt").write_text(
        'MODEL_FLAGS="--attention_resolutions 32,16,8 --class_cond True \\\n'
        '--dropout 0.1 --image_size 64 --num_channels=192"'
    )
    expected = {
        "attention_resolutions": "32,16,8",
        "class_cond": True,
        "dropout": 0.1,
        "image_size": 64,
        "num_channels": 192,
    }
    assert read_flags(("published.txt",)) == expected
    assert read_flags(tuple(f"{name}={value}" for name, value in expected.items())) == expected
    Path("flags.json").write_text(json.dumps(expected))
    assert read_flags(("flags.json",)) == expected
    assert read_flags(()) is None


CONTRADICTIONS = {  # (flag, what the message names: the flag, and the tensor)
    "num_channels": (64, "time_embed.0.weight"),
    "num_res_blocks": (2, ""),
    "channel_mult": ("1,3", ""),
    "attention_resolutions": ("16,8", ".1.norm"),
    "class_cond": (False, "label_emb.weight"),
    "learn_sigma": (False, "out.2.weight"),
    "use_scale_shift_norm": (False, "emb_layers"),
    "resblock_updown": (False, ".op."),
}


@pytest.mark.parametrize("flag", CONTRADICTIONS)
def test_flags_that_contradict_the_weights(run, flag, tmp_path):  # noqa: F811
    value, tensor = CONTRADICTIONS[flag]
    written(FLAGS)
    Path("flags.json").write_text(json.dumps(FLAGS | {flag: value}))
    assert_refused(run("import", "adm.pt", "--flags", "flags.json", "--out", "teacher"), flag, tensor)
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"noise_schedule": "sigmoid"}, "noise_schedule is 'sigmoid'"),
        ({"num_heads_upsample": 2}, "num_heads_upsample"),
        ({"num_heads": 5}, "5 heads"),
        ({"large_size": 256}, "large_size"),
        ({"class_cond": "maybe"}, "class_cond"),
        ({"attention_resolutions": "all"}, "attention_resolutions"),
        ({"channel_mult": ""}, "channel_mult"),
        ({"image_size": 15}, "15×15"),
    ],
)
def test_flags_that_are_not_known_to_be_right(run, flags, said, tmp_path):  # noqa: F811
    written(FLAGS)
    Path("flags.json").write_text(json.dumps(FLAGS | flags))
    assert_refused(run("import", "adm.pt", "--flags", "flags.json", "--out", "teacher"), said)
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [("num_heads", 2), ("use_new_attention_order", True), ("rescale_timesteps", True), ("num_head_channels", 32)],
)
def test_what_no_shape_shows_is_found_by_a_check(run, flag, value, tmp_path):  # noqa: F811
    flags = FLAGS | {"diffusion_steps": 500}
    weights, plain = written(flags | {flag: value})
    save_file(outputs(weights, plain), "check.safetensors")
    Path("flags.json").write_text(json.dumps(flags))
    result = run("import", "adm.pt", "--flags", "flags.json", "--check", "check.safetensors", "--out", "teacher")
    assert_refused(result, "off (at most")
    assert not (tmp_path / "teacher").exists()


def test_what_is_taken_from_the_defaults_is_said(run):  # noqa: F811
    written(FLAGS | {"noise_schedule": "linear"})
    short = {name: FLAGS[name] for name in FLAGS if name not in ("noise_schedule", "num_heads", "rescale_timesteps")}
    Path("flags.json").write_text(json.dumps(short))
    result = run("import", "adm.pt", "--flags", "flags.json", "--out", "teacher")
    assert result.code == 0 and "not compared" in result.err
    assert "num_heads = 4" in result.out and "noise_schedule = 'linear'" in result.out


def test_two_networks_in_one_teacher(run):  # noqa: F811
    written(FLAGS | {"class_cond": False}, "plain.pt", seed=1)
    written(FLAGS)
    result = run("import", "adm.pt", "--flags", "flags.json", "--unconditional", "plain.pt", "--out", "teacher")
    assert result.code == 0, result
    teacher = checkpoint.load("teacher")
    assert teacher.config.can_guide and [one.file for one in teacher.config.sources] == ["adm.pt", "plain.pt"]
    arguments = ("--flags", "flags.json", "--out", "other", "--check-unconditional", "x.npz")
    assert_refused(run("import", "adm.pt", *arguments), "--check-unconditional")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_files_of_something_else(run, tmp_path):  # noqa: F811
    weights, _ = written(FLAGS)
    flags = ("--flags", "flags.json", "--out", "teacher")
    assert_refused(run("import", "adm.pt", "--out", "teacher"), "--flags")
    assert_refused(run("import", "none.pt", *flags), "none.pt")
    Path("cut.pt").write_bytes(Path("adm.pt").read_bytes()[:-1000])
    assert_refused(run("import", "cut.pt", *flags), "cut.pt")
    Path("text.pt").write_text("hello")
    assert_refused(run("import", "text.pt", *flags), "text.pt")
    Path("adm.bin").write_text("hello")
    assert_refused(run("import", "adm.bin", *flags), "no known kind")
    torch.save(weights | {"code": Malicious()}, "code.pt")
    assert_refused(run("import", "code.pt", *flags), "code.pt", "something else than tensors")
    torch.save({"model": weights, "step": 3}, "more.pt")
    assert_refused(run("import", "more.pt", *flags), "something else than tensors")
    assert_refused(run("import", "adm.pt", *flags, "--scheduler", "x"), "--scheduler")
    assert_refused(run("import", "adm.pt", "--flags", "nothing.json", "--out", "teacher"), "nothing.json")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "teacher").exists()
