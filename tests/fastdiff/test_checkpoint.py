"""Checkpoints: what is saved comes back, what is damaged is named, and a crash never costs the old one."""

import contextlib
import errno
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import threading
import time
import weakref
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastdiff import checkpoint, files
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


@pytest.fixture
def older(saved) -> Path:
    """As checkpoints were before there were manifests."""
    (saved / "manifest.json").unlink()
    return saved


@pytest.fixture(params=["saved", "older"])
def either(request) -> Path:
    return request.getfixturevalue(request.param)


def edit_json(folder: Path, **changes) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- Round trips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "schedule": LinearBetaSchedule(2e-4, 0.03, 500),
            "parameterization": "eps",
            "kind": "stage1",
            "guidance_range": (0.25, 4.0),
            "class_names": ("zero", "β", "猫"),
        },
        {"schedule": KarrasSchedule(0.01, 50.0, 5.0), "parameterization": "edm"},
        {
            "schedule": CosineSchedule(15.0),
            "parameterization": "x",
            "kind": "stage2",
            "sampler": "stochastic",
            "steps": 4,
            "guidance_range": (0.0, 1.5),
        },
    ],
    ids=["defaults", "stage1", "edm", "stage2"],
)
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
        (8, 4),
        1,
        0,
        channels=6,
        channel_mult=(2, 1),
        blocks=2,
        attention_resolutions=(8, 4),
        head_width=None,
        dropout=0.25,
        guidance_input=True,
        scale_shift=False,
        resample="conv-asymmetric",
        resample_skip_conv=True,
        residual_scale=0.5**0.5,
        groups=3,
        min_group_width=2,
        eps=1e-6,
        middle_attention=False,
        decoder_attention="last",
        qkv_order="head-width-qkv",
        time_scale=1.0,
        time_endpoint=True,
        label_before_mlp=True,
    )
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_weights_dtype_is_kept(tmp_path, dtype):
    denoiser = make().to(dtype)
    checkpoint.save(tmp_path / "model", denoiser)
    assert_same_weights(weights_of(checkpoint.load(tmp_path / "model")), weights_of(denoiser))


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
    assert sorted(p.name for p in saved.iterdir()) == ["manifest.json", "model.json", "model.safetensors"]
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


def test_missing_weights(either):
    (either / "model.safetensors").unlink()
    assert_error(either, either / "model.safetensors", "missing")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_truncated_weights(either, keep):
    path = either / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert_error(either, path, "damaged")


@pytest.mark.parametrize("content", [b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7 + b"{}", b"x" * 9])
def test_weights_that_are_something_else(either, content):
    path = either / "model.safetensors"
    path.write_bytes(content)
    assert_error(either, path)


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": 1,', b"\xff\xfe\x00", b"[" * 100_000])
def test_corrupted_description(either, content):
    (either / "model.json").write_bytes(content)
    assert_error(either, either / "model.json", "damaged")


@pytest.mark.parametrize("content", ["[]", "null", "3", '"format"'])
def test_description_of_the_wrong_type(either, content):
    (either / "model.json").write_text(content)
    assert_error(either, either / "model.json", "damaged")


@pytest.mark.parametrize("number", [0, 2, "1", None])
def test_another_format(older, number):
    edit_json(older, format=number)
    assert_error(older, older / "model.json", "format 1")


def test_no_format(older):
    (older / "model.json").write_text(json.dumps(make().config.to_dict()))
    assert_error(older, older / "model.json", "format 1")


@pytest.mark.parametrize("field", ["unet", "schedule"])
def test_missing_fields(older, field):
    values = json.loads((older / "model.json").read_text())
    del values[field]
    (older / "model.json").write_text(json.dumps(values))
    assert_error(older, older / "model.json", field)


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
def test_unusable_values(older, changes, part):
    """Also in a whole description with one wrong value: every other field is as it was saved."""
    if isinstance(changes.get("unet"), dict):
        unet = json.loads((older / "model.json").read_text())["unet"]
        changes = {"unet": {**unet, **changes["unet"]}}
    edit_json(older, **changes)
    assert_error(older, older / "model.json", part)


def test_weights_of_another_architecture(tmp_path, older):
    wider = Denoiser(DenoiserConfig(unet=replace(UNET, channels=16, head_width=8)))
    other = checkpoint.save(tmp_path / "other", wider)
    shutil.copy(other / "model.safetensors", older)
    assert_error(older, older / "model.safetensors", "another architecture", "conv_in.bias")


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_one_wrong_tensor_is_named(older, change):
    path = older / "model.safetensors"
    weights = load_file(path)
    name = {"missing": "conv_out.bias", "extra": "conv_mid.bias", "shape": "middle.0.attention.qkv.bias"}[change]
    if change == "missing":
        del weights[name]
    else:
        weights[name] = torch.zeros(5)
    save_file(weights, path)
    assert_error(older, path, "1 tensors differ", name)


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
    def write_text(self, text):
        self.write_bytes(text[:40].encode())
        raise Crash

    monkeypatch.setattr(Path, "write_text", write_text)
    return Crash


def disk_full(monkeypatch):
    def save_file(tensors, path, *rest):
        Path(path).write_bytes(b"\0" * 100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    return UserError


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


def test_a_full_drive_is_told_in_one_sentence_and_nothing_is_left(tmp_path, monkeypatch):
    disk_full(monkeypatch)
    call = lambda folder: checkpoint.save(folder, make())  # noqa: E731
    assert_error(tmp_path / "model", tmp_path / "model", "No space left", "make room", call=call)
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def small_files(limit: int = 10_000):
    """The operating system refuses to write more into any file, as it does on a full drive."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_refusal_of_the_operating_system_is_told_too(tmp_path):
    """Safetensors has an exception of its own for it."""
    checkpoint.save(tmp_path / "model", make(seed=1))
    with small_files(), pytest.raises(UserError, match=os.strerror(errno.EFBIG)):
        checkpoint.save(tmp_path / "model", make(seed=2))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_same_weights(weights_of(checkpoint.load(tmp_path / "model")), weights_of(make(seed=1)))


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    call = lambda folder: checkpoint.save(folder, make())  # noqa: E731
    assert_error(tmp_path / "file" / "model", tmp_path / "file" / "model", "Not a directory", call=call)
    assert (tmp_path / "file").read_text() == "mine"


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
        with pytest.raises(UserError, match="busy"):
            checkpoint.save(tmp_path / "model", make(seed=2))
    assert_same_weights(weights_of(checkpoint.load(tmp_path / "model")), weights_of(make(seed=1)))


def steps_of_a_save(monkeypatch, at: int | None = None) -> list[str]:
    """Patch everything that changes the drive, so that it is noted, and that the step of number `at` is a crash."""
    done = []

    def patched(name, function):
        def step(*arguments, **options):
            done.append(name)
            if len(done) - 1 == at:
                raise Crash
            return function(*arguments, **options)

        return step

    for owner, name in ((Path, "mkdir"), (Path, "rename"), (Path, "write_text"), (Path, "write_bytes")):
        monkeypatch.setattr(owner, name, patched(name, getattr(owner, name)))
    for owner, name in ((checkpoint, "save_file"), (files, "sync"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, patched(name, getattr(owner, name)))
    return done


def test_a_crash_between_any_two_steps_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """The old one until the second renaming, and then the new one."""
    folder, seen = tmp_path / "model", []
    monkeypatch.setattr(checkpoint, "EXCHANGE_SECONDS", 0)
    for at in range(100):
        shutil.rmtree(tmp_path)
        checkpoint.save(folder, make(seed=1), state={"step": 1})
        with monkeypatch.context() as patched:
            done = steps_of_a_save(patched, at)
            with contextlib.suppress(Crash):
                checkpoint.save(folder, make(seed=2), state={"step": 2})
        state, _ = checkpoint.load_state(checkpoint.find(folder))
        assert_same_weights(weights_of(checkpoint.load(folder)), weights_of(make(seed=state["step"])))
        seen.append(state["step"])
        checkpoint.save(folder, make(seed=3))
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        if len(done) <= at:
            break
    assert done[-4:] == ["rename", "rename", "sync", "rmtree"] and done.count("sync") == 7
    assert seen == [1] * (len(done) - 2) + [2] * 3


def test_everything_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    flushed, real = [], os.fsync

    def fsync(descriptor):
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    folder = checkpoint.save(tmp_path / "model", make(), state={})
    beside = tmp_path / ".model.writing"
    assert sorted(flushed[:-2]) == sorted(beside / path.name for path in folder.iterdir()) and len(flushed) == 7
    assert flushed[-2:] == [beside, tmp_path]


# --- What a kill leaves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "steps-4", "checkpoint-20"])
def test_a_checkpoint_moved_aside_by_a_killed_save_is_put_back(tmp_path, name):
    checkpoint.save(tmp_path / "run" / name, make())
    (tmp_path / "run" / name).rename(tmp_path / "run" / f".{name}.replaced")
    (tmp_path / "run" / f".{name}.writing").mkdir()
    folder = tmp_path / "run" if name.startswith("checkpoint") else tmp_path / "run" / name
    assert checkpoint.find(folder) == tmp_path / "run" / name
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted([name, f".{name}.writing"])


def test_a_round_moved_aside_is_among_the_models_of_its_run(tmp_path):
    for name in ("steps-8", "steps-4"):
        checkpoint.save(tmp_path / name, make())
    (tmp_path / "steps-4").rename(tmp_path / ".steps-4.replaced")
    assert_error(tmp_path, tmp_path / "steps-4", tmp_path / "steps-8")


def test_an_exchange_that_is_under_way_is_left_alone(tmp_path):
    """Another process looks just between the two renames."""
    folder, beside = tmp_path / "model", tmp_path / ".model.writing"
    for seed, place in ((1, tmp_path / ".model.replaced"), (2, beside)):
        checkpoint.save(place, make(seed=seed))
    timer = threading.Timer(0.05, beside.rename, [folder])
    timer.start()
    assert_same_weights(weights_of(checkpoint.load(folder)), weights_of(make(seed=2)))
    timer.join()
    assert (tmp_path / ".model.replaced").is_dir()


def test_the_current_folder_can_be_named(saved, monkeypatch):
    monkeypatch.chdir(saved)
    assert_same_weights(weights_of(checkpoint.load(".")), weights_of(make()))


def save_until_killed(run: Path, pipe: int) -> None:
    """In a child process: replace `model`, add numbered checkpoints, and tell each step that is on the drive."""
    denoiser = make()
    newest = checkpoint.newest(run)
    first = int(newest.name.removeprefix("checkpoint-")) + 1 if newest else 1
    with checkpoint.Writer() as writer:
        for step in range(first, 10**6):
            with torch.no_grad():
                for parameter in denoiser.parameters():
                    parameter.fill_(step)
            tensors = {"a": torch.full((1000,), float(step))}
            writer.save(run / f"checkpoint-{step}", denoiser, state={"step": step}, state_tensors=tensors, keep=2)
            checkpoint.save(run / "model", denoiser, state={"step": step}, state_tensors=tensors)
            writer.wait()
            os.write(pipe, step.to_bytes(4, "little"))


def assert_all_of_one_step(folder: Path, least: int) -> None:
    state, tensors = checkpoint.load_state(checkpoint.find(folder))
    step = state["step"]
    assert step >= least
    assert torch.equal(tensors["a"], torch.full((1000,), float(step)))
    assert all((parameter == step).all() for parameter in checkpoint.load(folder).parameters())


def test_kills_at_random_moments_cost_nothing_that_was_saved(tmp_path, capsys):
    """Each trial goes on where the last was killed, among what it left."""
    rng, safe, left = random.Random(0), 0, Counter()
    for _ in range(24):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                save_until_killed(tmp_path, writing)
            finally:
                os._exit(1)
        os.close(writing)
        with open(reading, "rb", buffering=0) as told:
            first = told.read(4)
            time.sleep(rng.uniform(0, 0.04))
            os.kill(child, signal.SIGKILL)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
            steps = first + told.read()
        safe = int.from_bytes(steps[-4:], "little")
        left.update(path.suffix for path in tmp_path.glob(".*"))
        for place in (tmp_path, tmp_path / "model"):
            assert_all_of_one_step(place, safe)
        assert len(checkpoint.numbered(tmp_path)) <= 3
    assert left[".writing"] >= 5  # they were killed in the middle of a save
    assert capsys.readouterr().err == ""


# --- The manifest -------------------------------------------------------------------------------------------------


def test_the_manifest_has_size_and_sha256_of_every_file(tmp_path):
    folder = checkpoint.save(tmp_path / "model", make(), state={"step": 1})
    lines = os.popen(f"sha256sum {folder}/[!m]* {folder}/mod*").read().splitlines()
    expected = {Path(line.split()[1]).name: line.split()[0] for line in lines}
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert {name: entry["sha256"] for name, entry in listed.items()} == expected and len(expected) == 4
    assert all(entry["size"] == (folder / name).stat().st_size for name, entry in listed.items())


FILES = ["model.json", "model.safetensors", "state.json", "state.safetensors", "manifest.json"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A run with two checkpoints; a test that damages one repairs it."""
    run = tmp_path_factory.mktemp("pair")
    for step in (1, 2):
        tensors = {"a": torch.randn(50), "b": torch.arange(3)}
        checkpoint.save(run / f"checkpoint-{step}", make(seed=step), state={"step": step}, state_tensors=tensors)
    return run


@contextlib.contextmanager
def damaged(path: Path, where: float, bit: int | None):
    """Flip a bit of the byte there, or cut the file off there."""
    content = path.read_bytes()
    position = min(int(where * len(content)), len(content) - 1)
    changed = bytearray(content)
    if bit is None:
        del changed[position:]
    else:
        changed[position] ^= 1 << bit
    path.write_bytes(changed)
    try:
        yield
    finally:
        path.write_bytes(content)


def warnings_of(call, *arguments):
    """What a call returns, and the lines that it writes on stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        found = call(*arguments)
    return found, err.getvalue().splitlines()


@settings(deadline=None, max_examples=60)
@given(file=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.none() | st.integers(0, 7))
@example(file="model.safetensors", where=0.0, bit=0)  # the header's length
@example(file="model.safetensors", where=1.0, bit=7)  # the last weight
@example(file="state.safetensors", where=1.0, bit=None)
@example(file="manifest.json", where=0.0, bit=None)
@example(file="manifest.json", where=1.0, bit=None)
def test_any_damage_is_named_and_the_checkpoint_before_is_used(pair, file, where, bit):
    path = pair / "checkpoint-2" / file
    with damaged(path, where, bit):
        assert_error(path.parent, path, call=checkpoint.verify)
        found, lines = warnings_of(checkpoint.newest, pair)
        assert found == pair / "checkpoint-1"
        assert len(lines) == 1 and lines[0].startswith(f"warning: {path} ") and str(found) in lines[0]
        if file != "state.safetensors" and file != "state.json":
            denoiser, lines = warnings_of(checkpoint.load, pair)
            assert_same_weights(weights_of(denoiser), weights_of(make(seed=1)))
            assert len(lines) == 1
        if file != "model.safetensors":
            (state, _), lines = warnings_of(checkpoint.newest_state, pair)
            assert state == {"step": 1} and len(lines) == 1
    assert warnings_of(checkpoint.newest, pair) == (pair / "checkpoint-2", [])


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_missing_is_named(tmp_path, pair, file):
    shutil.copytree(pair, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-2" / file
    path.unlink()
    found, lines = warnings_of(checkpoint.newest, tmp_path / "run")
    if file == "manifest.json":  # then it is as those were that had none
        assert found == path.parent and not lines
    else:
        assert found == tmp_path / "run" / "checkpoint-1" and len(lines) == 1 and f"{path} is missing" in lines[0]


@pytest.mark.parametrize("file", FILES[:4])
def test_a_file_of_another_checkpoint_is_named(tmp_path, pair, file):
    shutil.copytree(pair, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-2" / file
    shutil.copy(tmp_path / "run" / "checkpoint-1" / file, path)
    if file == "model.json":  # they are the same: nothing is wrong
        checkpoint.verify(path.parent)
    else:
        assert_error(path.parent, path, "of another checkpoint", call=checkpoint.verify)


def test_a_file_that_was_not_saved_is_never_read(tmp_path, saved):
    other = checkpoint.save(tmp_path / "other", make(), state={"step": 9})
    for name in ("state.json", "state.safetensors"):
        shutil.copy(other / name, saved)
    (saved / "notes.txt").write_text("mine")
    assert_error(saved, saved / "state.json", "foreign", call=checkpoint.load_state)
    assert_same_weights(weights_of(checkpoint.load(saved)), weights_of(make()))


def test_where_nothing_is_whole_all_are_named(tmp_path, pair):
    shutil.copytree(pair, tmp_path / "run")
    wrong = [tmp_path / "run" / "checkpoint-1" / "model.json", tmp_path / "run" / "checkpoint-2" / "model.safetensors"]
    for path in wrong:
        path.write_bytes(path.read_bytes()[:-1])
    for call in (checkpoint.newest, checkpoint.find, checkpoint.load):
        assert_error(tmp_path / "run", *wrong, "--overwrite", call=call)
    assert checkpoint.newest_state(tmp_path / "run")[0] == {"step": 2}  # to continue, the model's file is not needed


def test_a_file_that_the_drive_cannot_read_is_named(tmp_path, pair, monkeypatch):
    def file_digest(file, name):
        if "checkpoint-2" in file.name and "state" in file.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, name)

    real = checkpoint.hashlib.file_digest
    monkeypatch.setattr(checkpoint.hashlib, "file_digest", file_digest)
    found, lines = warnings_of(checkpoint.newest, pair)
    assert found == pair / "checkpoint-1" and "Input/output error" in lines[0]


def test_an_older_checkpoint_is_verified_as_far_as_that_goes(tmp_path, pair):
    shutil.copytree(pair, tmp_path / "run")
    for folder in (tmp_path / "run").iterdir():
        (folder / "manifest.json").unlink()
    path = tmp_path / "run" / "checkpoint-2" / "state.safetensors"
    assert checkpoint.newest(tmp_path / "run") == path.parent
    path.write_bytes(path.read_bytes()[:-1])
    found, lines = warnings_of(checkpoint.newest, tmp_path / "run")
    assert found.name == "checkpoint-1" and str(path) in lines[0]


def test_a_newer_format_is_refused_even_where_an_older_checkpoint_lies_before_it(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "checkpoint-1", make(), state={})
    monkeypatch.setattr(checkpoint, "FORMAT", 7)
    folder = checkpoint.save(tmp_path / "checkpoint-2", make(), state={})
    monkeypatch.undo()
    for call in (checkpoint.load, checkpoint.find, checkpoint.newest, checkpoint.newest_state):
        assert_error(tmp_path, folder / "model.json", "format 7", "reads format 1", "update fastdiff", call=call)


def test_nothing_is_read_twice_and_nothing_that_is_not_needed(tmp_path, pair, monkeypatch):
    read, real = Counter(), checkpoint.hashlib.file_digest

    def file_digest(file, name):
        read[Path(file.name).name] += 1
        return real(file, name)

    monkeypatch.setattr(checkpoint.hashlib, "file_digest", file_digest)
    for call, expected in (
        (checkpoint.load, ["model.json", "model.safetensors"]),
        (checkpoint.newest_state, ["model.json", "state.json", "state.safetensors"]),
    ):
        call(pair)
        assert read == Counter(expected)
        read.clear()
    checkpoint.newest(pair)
    assert all(read[name] == 1 for name in FILES if name.endswith(".safetensors"))


# --- In the background --------------------------------------------------------------------------------------------


def hold_writes(monkeypatch) -> threading.Event:
    """Every write waits until this is set."""
    release, real = threading.Event(), checkpoint._write

    def write(*arguments):
        release.wait(10)
        real(*arguments)

    monkeypatch.setattr(checkpoint, "_write", write)
    return release


def test_a_save_is_of_everything_as_it_was_when_it_was_called(tmp_path, monkeypatch):
    release, denoiser = hold_writes(monkeypatch), make()
    state = {"step": 1, "data": {"position": 5}}
    tensors = {"sum": torch.ones(3), "view": torch.arange(6.0).view(2, 3).T}
    expected = {key: value.clone() for key, value in tensors.items()}
    with checkpoint.Writer() as writer:
        writer.save(tmp_path / "model", denoiser, state=state, state_tensors=tensors)
        assert not (tmp_path / "model").exists()  # training goes on
        state["data"]["position"] = 6
        for value in (*denoiser.state_dict().values(), *tensors.values()):
            value.zero_()
        release.set()
    assert_same_weights(weights_of(checkpoint.load(tmp_path / "model")), weights_of(make()))
    found_state, found = checkpoint.load_state(tmp_path / "model")
    assert found_state == {"step": 1, "data": {"position": 5}}
    assert_same_weights(found, expected)


def test_a_background_save_writes_the_same_files(tmp_path):
    tensors = {"a": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), "n": torch.tensor(3)}
    checkpoint.save(tmp_path / "one", make(), state={"step": 1}, state_tensors=tensors)
    with checkpoint.Writer() as writer:
        writer.save(tmp_path / "two", make(), state={"step": 1}, state_tensors=tensors)
        assert writer.wait()
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_saves_are_written_in_the_order_of_the_calls(tmp_path):
    with checkpoint.Writer() as writer:
        for seed in range(5):
            writer.save(tmp_path / "model", make(seed=seed))
    assert_same_weights(weights_of(checkpoint.load(tmp_path / "model")), weights_of(make(seed=4)))


def test_there_is_never_more_than_one_copy_in_memory(tmp_path, monkeypatch):
    class Watched(dict):
        __hash__ = object.__hash__

    alive, most = weakref.WeakSet(), []
    real = checkpoint._contents

    def contents(*arguments, **options):
        made = Watched(real(*arguments, **options))
        alive.add(made)
        most.append(len(alive))
        return made

    monkeypatch.setattr(checkpoint, "_contents", contents)
    with pytest.raises(UserError), checkpoint.Writer() as writer:
        for step in range(3):
            writer.save(tmp_path / f"checkpoint-{step}", make())
        with small_files():  # nor does a failure hold on to it
            for step in range(3, 6):
                writer.save(tmp_path / f"checkpoint-{step}", make())
            writer.wait()
    assert most == [1] * 6


def test_a_second_save_waits_for_the_first(tmp_path, monkeypatch):
    release = hold_writes(monkeypatch)
    with checkpoint.Writer() as writer:
        writer.save(tmp_path / "checkpoint-1", make())
        second = threading.Thread(target=writer.save, args=(tmp_path / "checkpoint-2", make()))
        second.start()
        second.join(0.05)
        assert second.is_alive()
        release.set()
        second.join(10)
        assert not second.is_alive() and (tmp_path / "checkpoint-1").exists()


def test_a_failed_write_is_told_once_and_training_goes_on(tmp_path, capsys):
    folder = tmp_path / "model"
    checkpoint.save(folder, make(seed=1))
    with checkpoint.Writer() as writer:
        with small_files():
            writer.save(folder, make(seed=2))
            assert not writer.wait() and str(folder) in writer.failure
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        assert_same_weights(weights_of(checkpoint.load(folder)), weights_of(make(seed=1)))
        assert not writer.wait()
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("warning: ")
        for part in (folder, "File too large", "make room", "training goes on"):
            assert str(part) in lines[0]
        writer.save(folder, make(seed=3))
        assert writer.wait() and writer.failure is None
    assert_same_weights(weights_of(checkpoint.load(folder)), weights_of(make(seed=3)))
    assert capsys.readouterr().err == ""


def test_a_failed_last_write_is_an_error_at_the_end(tmp_path, capsys):
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"run/checkpoint-1 was not written.*--resume"), checkpoint.Writer() as writer:
        writer.save(tmp_path / "run" / "checkpoint-1", make())
    assert capsys.readouterr().err == ""  # it is told once


def test_the_last_write_is_finished_when_training_fails(tmp_path, monkeypatch):
    real = checkpoint._write
    monkeypatch.setattr(checkpoint, "_write", lambda *arguments: (time.sleep(0.1), real(*arguments)))
    with pytest.raises(KeyboardInterrupt), checkpoint.Writer() as writer:
        writer.save(tmp_path / "model", make())
        raise KeyboardInterrupt
    assert checkpoint.find(tmp_path / "model")


def test_a_mistake_in_the_program_is_not_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_manifest", lambda files: 1 / 0)
    with pytest.raises(ZeroDivisionError), checkpoint.Writer() as writer:
        writer.save(tmp_path / "model", make())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_old_checkpoints_go_once_the_new_one_is_complete(tmp_path, monkeypatch):
    with checkpoint.Writer() as writer:
        for step in (8, 9, 10):
            writer.save(tmp_path / f"checkpoint-{step}", make(), keep=2)
        writer.wait()
        assert names(tmp_path) == ["checkpoint-10", "checkpoint-9"]
        with small_files():
            writer.save(tmp_path / "checkpoint-11", make(), keep=1)
            assert not writer.wait()
        assert names(tmp_path) == ["checkpoint-10", "checkpoint-9"]
        writer.save(tmp_path / "checkpoint-11", make(), keep=1)
    assert names(tmp_path) == ["checkpoint-11"]


def test_a_damaged_newer_checkpoint_does_not_take_a_good_one_s_place(tmp_path):
    """A run goes on from the last whole one, and saves at other updates than before."""
    for step in (10, 30):
        checkpoint.save(tmp_path / f"checkpoint-{step}", make(seed=step))
    (tmp_path / "checkpoint-30" / "model.json").write_text("")
    with checkpoint.Writer() as writer:
        writer.save(tmp_path / "checkpoint-20", make(seed=20), keep=1)
    assert names(tmp_path) == ["checkpoint-20", "checkpoint-30"]
    found, lines = warnings_of(checkpoint.newest, tmp_path)
    assert found.name == "checkpoint-20" and len(lines) == 1
    with checkpoint.Writer() as writer:
        writer.save(tmp_path / "checkpoint-40", make(seed=40), keep=1)
    assert names(tmp_path) == ["checkpoint-40"]


def test_remains_of_killed_saves_are_cleaned_away(tmp_path):
    for name in (".checkpoint-5.writing", ".checkpoint-7.replaced", ".steps-4.writing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.json").write_text("half")
    checkpoint.save(tmp_path / "checkpoint-7", make())
    with checkpoint.Writer() as writer:
        writer.save(tmp_path / "checkpoint-9", make(), keep=2)
    assert names(tmp_path) == [".steps-4.writing", "checkpoint-7", "checkpoint-9"]
