"""`fastdiff import` of diffusers' folders, as diffusers saves them and computes with them."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import assert_refused, elsewhere, run  # noqa: F401
from safetensors.torch import load_file, save_file

from fastdiff import checkpoint, rotation
from fastdiff.denoiser import Guided
from fastdiff.imports import diffusers as importer

diffusers = pytest.importorskip("diffusers")

SIZE = {"sample_size": 16, "in_channels": 3, "out_channels": 3, "norm_num_groups": 8}
DDPM = SIZE | {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
CLASSES = SIZE | {
    "block_out_channels": (16, 24, 48),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "num_class_embeds": 5,
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 8,
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
}
RESNET = SIZE | {
    "sample_size": (16, 8),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "attention_head_dim": 16,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
SCHEDULERS = {
    "linear": {},
    "scaled_linear, v": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction",
    },
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "cosine to zero SNR, v": {
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    },
    "given, x": {"trained_betas": [0.02 * (k + 1) for k in range(40)], "prediction_type": "sample"},
}


def network(options: dict, seed: int = 0) -> "diffusers.UNet2DModel":
    torch.manual_seed(seed)
    net = diffusers.UNet2DModel(**options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape) / max(1, parameter[0].numel()) ** 0.5)
    return net.eval()


def saved(folder, options: dict = DDPM, scheduler: dict | None = None, *, kind="DDPM", seed=0):
    """A pipeline's folder, its network and its scheduler."""
    net = network(options, seed)
    noise = getattr(diffusers, f"{kind}Scheduler")(**(scheduler or {}))
    getattr(diffusers, f"{kind}Pipeline")(unet=net, scheduler=noise).save_pretrained(folder)
    return net, noise


def changed(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def image(net, scheduler, x, step, noise, label) -> torch.Tensor:
    """x̂ by diffusers: the noisy image, its network, and its scheduler's own prediction of the image."""
    z = scheduler.add_noise(x, noise, step)
    output = net(z, step, class_labels=label).sample
    ddim = diffusers.DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    ddim.set_timesteps(scheduler.config.num_train_timesteps)
    return torch.stack(
        [ddim.step(output[i : i + 1], int(step[i]), z[i : i + 1]).pred_original_sample[0] for i in range(len(step))]
    )


@pytest.mark.parametrize("options", [DDPM, CLASSES, RESNET], ids=["DDPM", "classes", "resnet resampling"])
def test_outputs_are_those_of_diffusers(run, options, tmp_path):  # noqa: F811
    net, _ = saved("peer", options)
    result = run("import", "peer", "--out", "teacher")
    assert result.code == 0, result
    assert float(result.out.split("outputs at most ")[1].split()[0]) <= 2e-5
    teacher = checkpoint.load("teacher")
    generator = torch.Generator().manual_seed(1)
    z, step = torch.randn(4, *teacher.image_shape, generator=generator), torch.tensor([0, 1, 500, 999])
    label = torch.tensor([0, 4, 2, 1]) if teacher.num_classes else None
    with torch.no_grad():
        found = teacher.network_output(z, teacher.schedule.angles()[step], label, None)
        expected = net(z, step, class_labels=label).sample
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert (found - expected.flip(0)).abs().max() > 1e-2 * expected.abs().max()  # time and label are heard


@pytest.mark.parametrize("name", SCHEDULERS)
def test_images_at_the_steps_are_those_of_diffusers(run, name):  # noqa: F811
    """The time map: x̂ from the angle alone, against diffusers' x̂ at its step."""
    net, scheduler = saved("peer", DDPM, SCHEDULERS[name])
    assert run("import", "peer", "--out", "teacher").code == 0
    teacher = checkpoint.load("teacher")
    steps = teacher.schedule.steps
    assert steps == scheduler.config.num_train_timesteps or name.startswith("given")
    step = torch.tensor([0, steps // 4, steps // 2, (3 * steps) // 4])
    generator = torch.Generator().manual_seed(2)
    x, noise = (torch.randn(4, 3, 16, 16, generator=generator) for _ in range(2))
    with torch.no_grad():
        expected = image(net, scheduler, x, step, noise, None)
        angle = teacher.schedule.angles()[step]
        z = scheduler.add_noise(x, noise, step)
        found = rotation.x_from_velocity(z, teacher(z, angle), angle)
    errors = (found - expected).abs().amax((1, 2, 3)) / expected.abs().amax((1, 2, 3))
    assert errors.max() <= 1e-5 * (10 if teacher.config.parameterization == "eps" else 1), errors
    assert teacher.time(teacher.schedule.angles()).tolist() == pytest.approx(range(steps), abs=1e-6)


def test_a_network_that_is_told_the_angle_instead_is_far_off(run):  # noqa: F811
    """What the time map is for."""
    net, _ = saved("peer")
    assert run("import", "peer", "--out", "teacher").code == 0
    teacher = checkpoint.load("teacher")
    angle = teacher.schedule.angles()[[500]]
    assert 800 < 1000 * angle.item() / (torch.pi / 2) < 900
    z = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = net(z, 500).sample
        told = net(z, 1000 * angle / (torch.pi / 2)).sample
    assert (told - expected).abs().max() > 0.05 * expected.abs().max()


def test_old_folders_in_one_place_and_with_old_names(run):  # noqa: F811
    """Before version 0.15: attention's layers had other names, and everything lay beside model_index.json."""
    saved("peer")
    weights = load_file("peer/unet/diffusion_pytorch_model.safetensors")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in names.items():
        weights = {key.replace(new, old): value for key, value in weights.items()}
    old = Path("old")
    old.mkdir()
    torch.save(weights, old / "diffusion_pytorch_model.bin")
    shutil.copy("peer/unet/config.json", old)
    shutil.copy("peer/scheduler/scheduler_config.json", old)
    shutil.copy("peer/model_index.json", old)
    result = run("import", "old", "--out", "teacher")
    assert result.code == 0, result
    assert run("import", "peer", "--out", "new").code == 0
    one, other = (checkpoint.load(name).state_dict() for name in ("teacher", "new"))
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_learned_variance_is_dropped_and_said(run):  # noqa: F811
    net, _ = saved("peer", DDPM | {"out_channels": 6}, {"variance_type": "learned_range"})
    result = run("import", "peer", "--out", "teacher")
    assert result.code == 0 and "half of conv_out.weight is dropped: it predicts the variance" in result.out
    teacher = checkpoint.load("teacher")
    z = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        found, expected = teacher.network_output(z, teacher.schedule.angles()[[10]], None, None), net(z, 10).sample
    assert (found - expected[:, :3]).abs().max() < 2e-5 * expected.abs().max()
    changed(Path("peer/scheduler/scheduler_config.json"), variance_type="fixed_small")
    assert_refused(run("import", "peer", "--out", "other"), "out_channels", "variance_type")


def test_the_last_class_may_stand_for_none(run):  # noqa: F811
    net, _ = saved("peer", CLASSES)
    assert run("import", "peer", "--out", "teacher", "--null-class").code == 0
    teacher = checkpoint.load("teacher")
    assert teacher.num_classes == 4 and teacher.config.can_guide
    z, angle, label = torch.randn(2, 3, 16, 16), teacher.schedule.angles()[[100, 700]], torch.tensor([0, 3])
    with torch.no_grad():
        velocity = Guided(teacher)(z, angle, label, torch.tensor([2.0, 2.0]))
        known, null = (net(z, torch.tensor([100, 700]), class_labels=one).sample for one in (label, label * 0 + 4))
        expected = rotation.velocity_from_eps(z, 3 * known - 2 * null, angle)
    assert (velocity - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_source_is_named_with_its_hash(run):  # noqa: F811
    saved("peer")
    assert run("import", "peer", "--out", "teacher").code == 0
    sources = json.loads(Path("teacher/model.json").read_text())["sources"]
    weights = Path("peer/unet/diffusion_pytorch_model.safetensors")
    assert {"format": "diffusers UNet2DModel", "file": weights.name} | {
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()
    } in sources
    assert [one["file"] for one in sources] == ["config.json", weights.name, "scheduler_config.json"]


WRONG_NETWORK = {
    "act_fn": ("gelu", "act_fn is 'gelu'"),
    "center_input_sample": (True, "center_input_sample is True"),
    "time_embedding_type": ("fourier", "time_embedding_type"),
    "mid_block_scale_factor": (2**0.5, "mid_block_scale_factor"),
    "class_embed_type": ("timestep", "class_embed_type"),
    "freq_shift": (0.5, "freq_shift"),
    "attn_norm_num_groups": (4, "attn_norm_num_groups"),
    "resnet_time_scale_shift": ("spatial", "resnet_time_scale_shift"),
    "down_block_types": (["SkipDownBlock2D", "AttnSkipDownBlock2D"], "down_block_types"),
    "up_block_types": (["UpBlock2D", "AttnUpBlock2D"], "up_block_types"),
    "upsample_type": ("resnet", "down_block_types"),
    "attention_head_dim": (5, "head"),
    "in_channels": (1, "out_channels"),
    "layers_per_block": (2, "layers_per_block"),
    "num_class_embeds": (7, "num_class_embeds"),
    "add_attention": (False, "add_attention"),
    "block_out_channels": ([16, 24], "block_out_channels"),
    "dual_attention": (True, "dual_attention"),
    "_class_name": ("UNet2DConditionModel", "_class_name"),
}


@pytest.mark.parametrize("name", WRONG_NETWORK)
def test_wrong_settings_of_the_network_are_refused_by_name(run, name, tmp_path):  # noqa: F811
    value, said = WRONG_NETWORK[name]
    saved("peer")
    changed(tmp_path / "peer/unet/config.json", **{name: value})
    assert_refused(run("import", "peer", "--out", "teacher"), said)
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "_class_name is 'EulerDiscreteScheduler'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule"),
        ({"prediction_type": "flow"}, "prediction_type"),
        ({"trained_betas": [0.1, -0.2, 0.3]}, "falls"),
        ({"rescale_betas_zero_snr": True}, "prediction_type"),
        ({"timestep_shift": 3.0}, "timestep_shift"),
        ({"beta_start": 0.0}, "beta_start"),
    ],
)
def test_wrong_schedulers_are_refused_by_name(run, values, said, tmp_path):  # noqa: F811
    saved("peer")
    changed(tmp_path / "peer/scheduler/scheduler_config.json", **values)
    assert_refused(run("import", "peer", "--out", "teacher"), said)
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize(("name", "value"), [("norm_eps", 1e-4), ("flip_sin_to_cos", True), ("downsample_padding", 1)])
def test_what_no_shape_shows_is_found_by_the_outputs(run, monkeypatch, name, value, tmp_path):  # noqa: F811
    """As if the importer had read a setting wrongly: the peer computes otherwise, and nothing is written."""
    saved("peer")
    read = importer._json
    monkeypatch.setattr(importer, "_json", lambda path: read(path) | ({name: value} if "unet" in str(path) else {}))
    assert_refused(run("import", "peer", "--out", "teacher"), "off")
    assert not (tmp_path / "teacher").exists()


def test_files_that_are_missing_or_damaged(run, tmp_path):  # noqa: F811
    saved("peer")
    peer = tmp_path / "peer"
    assert_refused(run("import", "nowhere", "--out", "teacher"), "nowhere")
    assert_refused(run("import", "peer/unet", "--out", "teacher"), "--scheduler")
    assert run("import", "peer/unet", "--scheduler", "peer/scheduler", "--out", "given").code == 0
    weights = peer / "unet/diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert_refused(run("import", "peer", "--out", "teacher"), weights.name, "truncated")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    save_file(tensors | {"extra.weight": torch.zeros(2)}, weights)
    assert_refused(run("import", "peer", "--out", "teacher"), "extra.weight")
    tensors["conv_norm_out.bias"] = tensors["conv_norm_out.bias"].long()
    save_file(tensors, weights)
    assert_refused(run("import", "peer", "--out", "teacher"), "conv_norm_out.bias", "int64")
    weights.unlink()
    assert_refused(run("import", "peer", "--out", "teacher"), "diffusion_pytorch_model")
    (peer / "unet/config.json").write_text("{")
    assert_refused(run("import", "peer", "--out", "teacher"), "config.json")
    changed(peer / "model_index.json", _class_name="StableDiffusionPipeline")
    assert_refused(run("import", "peer", "--out", "teacher"), "StableDiffusionPipeline")
    assert not (tmp_path / "teacher").exists()


def test_nothing_of_the_users_is_overwritten(run, tmp_path):  # noqa: F811
    saved("peer")
    assert run("import", "peer", "--out", "teacher").code == 0
    assert_refused(run("import", "peer", "--out", "teacher"), "--overwrite")
    assert run("import", "peer", "--out", "teacher", "--overwrite").code == 0
    assert_refused(run("import", "peer", "--out", "peer", "--overwrite"), "no part of a teacher")
    (tmp_path / "file").write_text("mine")
    assert_refused(run("import", "peer", "--out", "file", "--overwrite"), "is a file")


# --- Guidance ---


def test_without_a_null_class_nothing_guides(run):  # noqa: F811
    saved("peer", SIZE | CLASSES | {"in_channels": 1, "out_channels": 1, "sample_size": 8, "num_class_embeds": 10})
    result = run("import", "peer", "--out", "teacher")
    assert result.code == 0 and "--unconditional" in result.out
    draw = ("sample", "--checkpoint", "teacher", "--num", "2", "--steps", "2", "--device", "cpu", "--out", "a.png")
    assert run(*draw).code == 0
    small = ("--updates", 1, "--batch-size", 2, "--device", "cpu", "--out", "student")
    refused = [
        run(*draw, "--guidance", "1", "--overwrite"),
        run("evaluate", "--checkpoint", "teacher", "--guidance", "1", "--device", "cpu", "--out", "b.json"),
        run("stage1", "--teacher", "teacher", *small),
        run("two_student", "--teacher", "teacher", "--start-steps", 2, *small),
        run(
            "translate", "--encoder", "teacher", "--decoder", "teacher", "--images", "a.png", "--from-label", 1,
            "--to-label", 2, "--guidance", 1, "--device", "cpu",
        ),
    ]  # fmt: skip
    for result in refused:
        assert_refused(result, "--unconditional", "null class")
    assert run("stage1", "--teacher", "teacher", "--guidance-range", 0, 0, *small).code == 0
    fine = ("--alpha", 1, "--sigma-min", 0.02, "--t-max", 400, "--data", "None", "--score-num", 2)
    assert run("sid", "--teacher", "teacher", *fine, *small[:-1], "sid").code == 0


def test_two_networks_in_one_teacher(run):  # noqa: F811
    tiny = SIZE | {"in_channels": 1, "out_channels": 1, "sample_size": 8}
    known, _ = saved("known", tiny | CLASSES | {**tiny, "num_class_embeds": 10})
    plain, _ = saved("plain", DDPM | tiny, seed=1)
    result = run("import", "known", "--unconditional", "plain", "--out", "teacher")
    assert result.code == 0 and result.out.count("outputs at most") == 2, result
    teacher = checkpoint.load("teacher")
    step, label, w = torch.tensor([30, 600]), torch.tensor([7, 0]), torch.tensor([1.0, 3.0])
    z, angle = torch.randn(2, 1, 8, 8), teacher.schedule.angles()[[30, 600]]
    with torch.no_grad():
        found = Guided(teacher)(z, angle, label, w)
        scale = w[:, None, None, None]
        eps = (1 + scale) * known(z, step, class_labels=label).sample - scale * plain(z, step).sample
    expected = rotation.velocity_from_eps(z, eps, angle)
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
    files = [source.file for source in teacher.config.sources]
    assert len(files) == 6
    small = ("--updates", 2, "--batch-size", 2, "--device", "cpu")
    assert run("stage1", "--teacher", "teacher", *small, "--out", "student").code == 0
    student = checkpoint.load("student")
    assert student.config.unconditional is None and student.config.sources == teacher.config.sources
    assert (
        run("sample", "--checkpoint", "student", "--guidance", 2, "--num", 2, "--device", "cpu", "--steps", 2).code == 0
    )
    draw = ("sample", "--checkpoint", "teacher", "--num", "2", "--steps", "2", "--device", "cpu", "--out", "a.png")
    result = run(*draw, "--guidance", "1")
    assert result.code == 0 and "4 network calls" in result.out
    assert_refused(run("two_student", "--teacher", "teacher", "--start-steps", 2, *small, "--out", "t"), "stage1")


def test_pairs_that_do_not_belong_together(run):  # noqa: F811
    saved("known", CLASSES)
    saved("plain", DDPM)
    saved("other", DDPM, {"beta_end": 0.01})
    saved("large", DDPM | {"sample_size": 32})
    saved("v", DDPM, {"prediction_type": "v_prediction"})
    for source, other, said in [
        ("known", "known", "give one without"),
        ("known", "other", "another schedule"),
        ("known", "v", "another parameterization"),
        ("known", "large", "another size"),
        ("plain", "plain", "nothing to guide"),
    ]:
        assert_refused(run("import", source, "--unconditional", other, "--out", "teacher"), said)
    result = run("import", "known", "--null-class", "--unconditional", "plain", "--out", "teacher")
    assert_refused(result, "leave --unconditional out")


# --- Outputs that the user made ---


def test_a_check_file(run, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(importer, "_peer", lambda folder: None)  # as where diffusers is not installed
    net, _ = saved("peer", CLASSES)
    result = run("import", "peer", "--out", "unchecked")
    assert result.code == 0 and "warning" in result.err and "--check" in result.err
    z, step, label = torch.randn(3, 3, 16, 16), torch.tensor([0, 400, 900]), torch.tensor([0, 2, 4])
    with torch.no_grad():
        outputs = {
            "input": z,
            "time": step,
            "label": label,
            "output": net(z, step, class_labels=label).sample.contiguous(),
        }
    save_file(outputs, "good.safetensors")
    result = run("import", "peer", "--check", "good.safetensors", "--out", "teacher")
    assert result.code == 0 and "warning" not in result.err
    assert float(result.out.split("outputs at most ")[1].split()[0]) <= 2e-5
    np.savez("good.npz", **{key: value.numpy() for key, value in outputs.items()})
    assert run("import", "peer", "--check", "good.npz", "--out", "teacher", "--overwrite").code == 0
    for name, change, said in [
        ("off", {"output": outputs["output"] * 1.001}, "off (at most"),
        ("swapped", {"label": label.flip(0)}, "off (at most"),
        ("few", {"time": torch.tensor([0, 0, 900])}, "2 noise levels"),
        ("step", {"time": torch.tensor([0, 400, 1000])}, "whole number"),
        ("shape", {"time": step[:2]}, "fit together"),
        ("classes", {"label": torch.tensor([0, 1, 5])}, "labels"),
        ("more", {"sigma": step.clone()}, "sigma"),
    ]:
        save_file({key: value.contiguous() for key, value in (outputs | change).items()}, f"{name}.safetensors")
        assert_refused(run("import", "peer", "--check", f"{name}.safetensors", "--out", "bad"), said)
    save_file({key: value for key, value in outputs.items() if key != "label"}, "bare.safetensors")
    assert_refused(run("import", "peer", "--check", "bare.safetensors", "--out", "bad"), "label")
    (tmp_path / "text.npz").write_text("no")
    assert_refused(run("import", "peer", "--check", "text.npz", "--out", "bad"), "text.npz")
    assert not (tmp_path / "bad").exists()
