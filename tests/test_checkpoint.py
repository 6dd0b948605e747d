"""Checkpoints: what is saved comes back, what is damaged is named, and a crash never costs the old one."""

import json
import os
import pickle
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdiff import checkpoint
from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.errors import UserError
from fastdiff.schedule import CosineSchedule, KarrasSchedule, LinearBetaSchedule
from fastdiff.unet import UNetConfig

UNET = UNetConfig((8, 8), 2, 3, channels=8, channel_mult=(1, 2), blocks=1, head_width=8, attention_resolutions=(4,))


def make(seed: int = 0, **options) -> Denoiser:
    """A small denoiser with random weights everywhere."""
    torch.manual_seed(seed)
    denoiser = Denoiser(DenoiserConfig(unet=UNET, **options))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.normal_(std=0.2)
    return denoiser


def weights_of(denoiser: Denoiser) -> dict[str, torch.Tensor]:
    return denoiser.network.state_dict()


def assert_same_weights(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def assert_error(folder: Path, *parts, call=checkpoint.load) -> None:
    """The call must raise one UserError, a single line that holds all the parts."""
    with pytest.raises(UserError) as caught:
        call(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


@pytest.fixture
def saved(tmp_path) -> Path:
    return checkpoint.save(tmp_path / "model", make())


def edit_json(folder: Path, **changes) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- Round trips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "schedule": LinearBetaSchedule(2e-4, 0.03, 500), "parameterization": "eps", "kind": "stage1",
            "guidance_range": (0.25, 4.0), "class_names": ("zero", "β", "猫"),
        },
        {"schedule": KarrasSchedule(0.01, 50.0, 5.0), "parameterization": "edm"},
        {
            "schedule": CosineSchedule(15.0), "parameterization": "x", "kind": "stage2", "sampler": "stochastic",
            "steps": 4, "guidance_range": (0.0, 1.5),
        },
    ],
    ids=["defaults", "stage1", "edm", "stage2"],
)  # fmt: skip
def test_round_trip_is_exact(tmp_path, options):
    denoiser = make(**options)
    assert checkpoint.save(tmp_path / "model", denoiser) == tmp_path / "model"
    loaded = checkpoint.load(tmp_path / "model")
    for field in fields(DenoiserConfig):
        assert getattr(loaded.config, field.name) == getattr(denoiser.config, field.name), field.name
    assert loaded.config == denoiser.config
    assert_same_weights(weights_of(loaded), weights_of(denoiser))
    z, angle = torch.randn(2, 2, 8, 8), torch.tensor([0.3, 1.4])
    with torch.no_grad():
        assert torch.equal(loaded(z, angle, torch.tensor([0, 2])), denoiser.eval()(z, angle, torch.tensor([0, 2])))


def test_a_path_may_be_a_string(tmp_path):
    checkpoint.save(str(tmp_path / "a" / "model"), make())
    assert_same_weights(weights_of(checkpoint.load(str(tmp_path / "a" / "model"))), weights_of(make()))


def test_every_architecture_field_round_trips(tmp_path):
    unet = UNetConfig(
        (8, 4), 1, 0, channels=6, channel_mult=(2, 1), blocks=2, attention_resolutions=(8, 4), head_width=None,
        dropout=0.25, guidance_input=True, scale_shift=False, resample="conv-asymmetric", resample_skip_conv=True,
        residual_scale=0.5**0.5, groups=3, min_group_width=2, eps=1e-6, middle_attention=False,
        decoder_attention="last", qkv_order="head-width-qkv", time_scale=1.0, time_endpoint=True,
        label_before_mlp=True,
    )  # fmt: skip
    checkpoint.save(tmp_path / "model", Denoiser(DenoiserConfig(unet=unet)))
    loaded = checkpoint.load(tmp_path / "model")
    assert loaded.config.unet == unet and loaded.network.config == unet
    assert loaded.image_shape == (1, 8, 4)


def test_a_loaded_model_is_ready_to_use_and_to_train(saved):
    loaded = checkpoint.load(saved)
    assert not any(module.training for module in loaded.modules())
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    kernels = [p for p in loaded.parameters() if p.ndim == 4 and p.shape[2] > 1]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    loaded(torch.randn(1, 2, 8, 8), torch.tensor([1.0]), torch.tensor([1])).square().sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())
    with torch.no_grad():  # and it owns its memory: the file is not mapped writable beneath it
        next(loaded.parameters()).add_(1)
    assert_same_weights(weights_of(checkpoint.load(saved)), weights_of(make()))


def test_other_weights_can_be_saved_in_the_model_s_place(tmp_path):
    average = {key: value / 2 for key, value in weights_of(make()).items()}
    checkpoint.save(tmp_path / "model", make(), weights=average)
    assert_same_weights(weights_of(checkpoint.load(tmp_path / "model")), average)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_weights_dtype_is_kept(tmp_path, dtype):
    weights = {key: value.to(dtype) for key, value in weights_of(make()).items()}
    checkpoint.save(tmp_path / "model", make(), weights=weights)
    assert_same_weights(weights_of(checkpoint.load(tmp_path / "model")), weights)


def test_state_round_trips(tmp_path):
    state = {"step": 12, "seed": 2**63, "history": [1.5, None], "nested": {"best": 0.125}}
    tensors = {
        "ema.weight": torch.randn(3, 4).T,  # not contiguous
        "adam.step": torch.tensor(7.0),
        "half": torch.randn(5).bfloat16(),
        "counts": torch.arange(4),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }
    checkpoint.save(tmp_path / "model", make(), state=state, state_tensors=tensors)
    found_state, found = checkpoint.load_state(tmp_path / "model")
    assert found_state == state
    assert_same_weights(found, tensors)


def test_state_without_tensors(tmp_path):
    checkpoint.save(tmp_path / "model", make(), state={"step": 1})
    assert checkpoint.load_state(tmp_path / "model") == ({"step": 1}, {})


def test_a_checkpoint_without_state_has_no_state_files(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["model.json", "model.safetensors"]
    assert_error(saved, saved / "state.json", "missing", call=checkpoint.load_state)


def test_replacing_drops_the_old_state(tmp_path):
    checkpoint.save(tmp_path / "model", make(), state={"step": 1})
    checkpoint.save(tmp_path / "model", make(seed=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert not (tmp_path / "model" / "state.json").exists()
    assert_same_weights(weights_of(checkpoint.load(tmp_path / "model")), weights_of(make(seed=1)))


# --- Which checkpoint a folder means ------------------------------------------------------------------------------


def test_a_run_folder_means_its_newest_checkpoint(tmp_path):
    for step in (900, 1000, 20):  # as names, 900 would be the last
        checkpoint.save(tmp_path / f"checkpoint-{step}", make(seed=step))
    (tmp_path / "checkpoint-2000").mkdir()  # begun, never finished
    assert checkpoint.find(tmp_path) == checkpoint.newest(tmp_path) == tmp_path / "checkpoint-1000"
    assert_same_weights(weights_of(checkpoint.load(tmp_path)), weights_of(make(seed=1000)))


def test_folders_of_other_names_do_not_confuse_the_search(tmp_path):
    for name in ("checkpoint-3", "checkpoint-best"):
        checkpoint.save(tmp_path / name, make())
    assert checkpoint.find(tmp_path) == tmp_path / "checkpoint-3"


def test_a_run_with_several_rounds_asks_which(tmp_path):
    for steps in (16, 4, 8):
        checkpoint.save(tmp_path / f"steps-{steps}", make())
    assert_error(tmp_path, *(tmp_path / f"steps-{n}" for n in (4, 8, 16)))
    with pytest.raises(UserError, match=r"steps-4.*steps-8.*steps-16"):
        checkpoint.find(tmp_path)
    assert checkpoint.find(tmp_path / "steps-8") == tmp_path / "steps-8"


def test_a_copy_of_a_round_does_not_confuse_the_search(tmp_path):
    for name in ("steps-8", "steps-old"):
        checkpoint.save(tmp_path / name, make())
    assert_error(tmp_path, tmp_path / "steps-8")


def test_where_there_is_no_checkpoint(tmp_path):
    assert_error(tmp_path / "nothing", tmp_path / "nothing", "does not exist")
    assert_error(tmp_path, tmp_path, "no model.json")
    (tmp_path / "checkpoint-5").mkdir()
    assert_error(tmp_path, tmp_path, "no model.json")
    assert checkpoint.newest(tmp_path) is None
    (tmp_path / "file").write_text("")
    assert_error(tmp_path / "file", tmp_path / "file")


# --- Damage -------------------------------------------------------------------------------------------------------


def test_missing_weights(saved):
    (saved / "model.safetensors").unlink()
    assert_error(saved, saved / "model.safetensors", "missing")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_truncated_weights(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert_error(saved, path, "damaged")


@pytest.mark.parametrize("content", [b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7 + b"{}", b"x" * 9])
def test_weights_that_are_something_else(saved, content):
    path = saved / "model.safetensors"
    path.write_bytes(content)
    assert_error(saved, path)


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": 1,', b"\xff\xfe\x00", b"[" * 100_000])
def test_corrupted_description(saved, content):
    (saved / "model.json").write_bytes(content)
    assert_error(saved, saved / "model.json", "damaged")


@pytest.mark.parametrize("content", ["[]", "null", "3", '"format"'])
def test_description_of_the_wrong_type(saved, content):
    (saved / "model.json").write_text(content)
    assert_error(saved, saved / "model.json", "damaged")


@pytest.mark.parametrize("number", [0, 2, "1", None])
def test_another_format(saved, number):
    edit_json(saved, format=number)
    assert_error(saved, saved / "model.json", "format 1")


def test_no_format(saved):
    (saved / "model.json").write_text(json.dumps(make().config.to_dict()))
    assert_error(saved, saved / "model.json", "format 1")


@pytest.mark.parametrize("field", ["unet", "schedule"])
def test_missing_fields(saved, field):
    values = json.loads((saved / "model.json").read_text())
    del values[field]
    (saved / "model.json").write_text(json.dumps(values))
    assert_error(saved, saved / "model.json", field)


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"colour": 3}, "colour"),
        ({"parameterization": "velocity"}, "velocity"),
        ({"kind": "stage3"}, "stage3"),
        ({"guidance_range": 3}, ""),
        ({"class_names": 3}, ""),
        ({"schedule": {"name": "sigmoid"}}, "sigmoid"),
        ({"schedule": {"name": "cosine", "slope": 3}}, "slope"),
        ({"schedule": None}, ""),
        ({"unet": None}, ""),
        ({"unet": [1]}, ""),
        ({"unet": {"colour": 3}}, "colour"),
        ({"unet": {"image_size": [9, 8]}}, "9×8"),
        ({"unet": {"channels": 7}}, "channels"),
        ({"unet": {"channels": "8"}}, ""),
        ({"unet": {"image_size": 8}}, ""),
        ({"unet": {"channel_mult": [1, None]}}, ""),
        ({"unet": {"qkv_order": "kqv"}}, "kqv"),
    ],
    ids=str,
)
def test_unusable_values(saved, changes, part):
    """Also in a whole description with one wrong value: every other field is as it was saved."""
    if isinstance(changes.get("unet"), dict):
        unet = json.loads((saved / "model.json").read_text())["unet"]
        changes = {"unet": {**unet, **changes["unet"]}}
    edit_json(saved, **changes)
    assert_error(saved, saved / "model.json", part)


def test_weights_of_another_architecture(tmp_path, saved):
    wider = Denoiser(DenoiserConfig(unet=replace(UNET, channels=16, head_width=8)))
    other = checkpoint.save(tmp_path / "other", wider)
    shutil.copy(other / "model.safetensors", saved)
    assert_error(saved, saved / "model.safetensors", "another architecture", "conv_in.bias")


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_one_wrong_tensor_is_named(saved, change):
    path = saved / "model.safetensors"
    weights = load_file(path)
    name = {"missing": "conv_out.bias", "extra": "conv_mid.bias", "shape": "middle.0.attention.qkv.bias"}[change]
    if change == "missing":
        del weights[name]
    else:
        weights[name] = torch.zeros(5)
    save_file(weights, path)
    assert_error(saved, path, "1 tensors differ", name)


@pytest.mark.parametrize("file", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_unusable_state(tmp_path, file, damage):
    folder = checkpoint.save(tmp_path / "model", make(), state={"step": 1}, state_tensors={"a": torch.ones(3)})
    if damage == "missing":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes((folder / file).read_bytes()[:-1])
    assert_error(folder, folder / file, damage, call=checkpoint.load_state)
    checkpoint.load(folder)  # the model itself is whole


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", ["model.safetensors", "model.json", "state.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_is_never_executed(tmp_path, file, how):
    folder = checkpoint.save(tmp_path / "model", make(), state={}, state_tensors={})
    trap = tmp_path / "executed"
    if how == "torch":
        torch.save({"conv_in.weight": Payload(trap)}, folder / file)
    else:
        (folder / file).write_bytes(pickle.dumps(Payload(trap)))
    call = checkpoint.load if file.startswith("model") else checkpoint.load_state
    assert_error(folder, folder / file, "damaged", call=call)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Payload(trap)))  # the trap works
    assert trap.exists()


# --- Crashes ------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """Nothing catches it, as nothing catches a power cut."""


def crash_in_json(monkeypatch):
    def dump(values, file, **options):
        file.write(json.dumps(values)[:40])
        file.flush()
        raise Crash

    monkeypatch.setattr(checkpoint.json, "dump", dump)
    return Crash


def disk_full(monkeypatch):
    def save_file(tensors, path, *rest):
        Path(path).write_bytes(b"\0" * 100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    return OSError


def crash_before_renaming(monkeypatch):
    def rename(self, target):
        raise Crash

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", rename)
    return Crash


@pytest.mark.parametrize("fail", [crash_in_json, disk_full, crash_before_renaming])
@pytest.mark.parametrize("name", ["model", "checkpoint-20"])
def test_a_crash_while_saving_leaves_what_was_there(tmp_path, monkeypatch, fail, name):
    checkpoint.save(tmp_path / "checkpoint-10", make(seed=10), state={"step": 10})
    checkpoint.save(tmp_path / "model", make(seed=1), state={"step": 1})
    with monkeypatch.context() as patched, pytest.raises(fail(patched)):
        checkpoint.save(tmp_path / name, make(seed=2), state={"step": 2})
    assert_same_weights(weights_of(checkpoint.load(tmp_path / "model")), weights_of(make(seed=1)))
    assert checkpoint.load_state(tmp_path / "model")[0] == {"step": 1}
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-10"  # half a checkpoint is none
    checkpoint.save(tmp_path / name, make(seed=3), state={"step": 3})  # and the remains are not in the way
    assert_same_weights(weights_of(checkpoint.load(tmp_path / name)), weights_of(make(seed=3)))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({"checkpoint-10", "model", name})


def test_disk_full_is_an_oserror_that_says_so(tmp_path, monkeypatch):
    disk_full(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path / "model", make())
    assert not (tmp_path / "model").exists()


def test_a_failed_exchange_puts_the_old_checkpoint_back(tmp_path, monkeypatch):
    """The new folder cannot be moved into place (say, a scanner on a network drive holds it open)."""
    checkpoint.save(tmp_path / "model", make(seed=1))
    rename = Path.rename

    def refuse(self, target):
        if Path(target).name == "model" and re.search("writing", self.name):
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refuse)
        with pytest.raises(OSError, match="busy"):
            checkpoint.save(tmp_path / "model", make(seed=2))
    assert_same_weights(weights_of(checkpoint.load(tmp_path / "model")), weights_of(make(seed=1)))
