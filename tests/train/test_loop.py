"""The training loop: what an update does, what is written, and that a stopped run continues as if it had not been."""

import contextlib
import functools
import json
import math
import os
import random
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import TINY, assert_same_weights
from PIL import Image

from fastdiff import cast, checkpoint, data
from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.errors import UserError
from fastdiff.losses import regression
from train import begin, loop
from train.batches import ImageBatches, run_seed, to_device
from train.interruption import Interruption
from train.options import LoopOptions
from train.teacher import RECIPE
from train.updater import Updater

REAL_PREVIEW = loop.preview
CONFIG = DenoiserConfig(TINY)
PLACES = ("whole", "parts")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DATASET = data.Dataset(
    np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8),
    np.arange(40) % 10,
    tuple("0123456789"),
    "noise",
    "train",
)


@pytest.fixture(autouse=True)
def no_preview(monkeypatch):
    monkeypatch.setattr(loop, "preview", lambda *args, **kwargs: None)


def teacher_loss(model, batch):
    return regression.teacher(model, batch)


def make_options(out, **changes):
    fields = {"updates": 12, "batch_size": 16, "warmup": 0, "lr": 1e-3, "device": "cpu"} | changes
    options = LoopOptions(out=out, **fields)
    options.check()
    return options


def make_updater(loss=teacher_loss, **changes):
    torch.manual_seed(0)
    return Updater(make_options("unused", **changes), Denoiser(CONFIG), loss)


def make_batches(updater, count):
    stream = data.Batches(DATASET, updater.options.batch_size, seed=1)
    return [to_device(next(stream), 10, 1, updater.device) for _ in range(count)]


def fit(out, *, loss=teacher_loss, name="run", **changes):
    options = make_options(out, **changes)
    begin.begin_run(options, begin.describe(RECIPE, options, DATASET))
    torch.manual_seed(options.seed)
    return loop.fit(Denoiser(CONFIG), loss, DATASET, options, name=name)


def read_log(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# --- one update ---


def test_parts_of_a_batch_share_weights_in_bf16(monkeypatch):
    """The same bits as each part's own, and one cast of the weights; their gradients are still added in float32."""
    shared, alone = (make_updater(accumulate=4, precision="bf16") for _ in range(2))
    monkeypatch.setattr(alone, "_weights_of_all_parts", contextlib.nullcontext)
    casts, copies = [], cast._copies
    monkeypatch.setattr(cast, "_copies", lambda tensors, dtype: casts.append(dtype) or copies(tensors, dtype))
    for updater, made in ((shared, 1), (alone, 4)):
        for batch in make_batches(updater, 2):
            casts.clear()
            updater.update(batch)
            assert Counter(casts) == {torch.bfloat16: made, torch.float32: 4}
    assert_same_weights(shared.denoiser, alone.denoiser, atol=0, rtol=0)
    assert all(parameter.dtype == torch.float32 for parameter in shared.denoiser.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_frozen_teacher_in_bf16_has_no_other_weights(monkeypatch, precision):
    frozen = begin.freeze(Denoiser(CONFIG), make_options("unused", precision=precision))
    assert {p.dtype for p in frozen.parameters()} == {torch.float32, DTYPES[precision]}
    monkeypatch.setattr("train.begin.OURS", ())  # a network of one's own
    frozen = begin.freeze(Denoiser(CONFIG), make_options("unused", precision=precision))
    assert {p.dtype for p in frozen.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("warmup", "anneal", "factors"),
    [
        (0, "none", [1] * 8),
        (0, "linear", [1 - n / 8 for n in range(8)]),
        (4, "none", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        (4, "linear", [0.25, 0.5 * 7 / 8, 0.75 * 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
    ],
)
def test_learning_rate(warmup, anneal, factors):
    updater = make_updater(updates=8, lr=0.02, warmup=warmup, anneal=anneal)
    used = []
    for batch in make_batches(updater, 8):
        updater.update(batch)
        used.append(float(updater.optimizer.param_groups[0]["lr"]))
    assert used == pytest.approx([0.02 * factor for factor in factors])
    if anneal == "linear":
        assert updater.learning_rate() == 0


def test_accumulation_equals_the_whole_batch():
    whole, parts = make_updater(), make_updater(accumulate=4)
    for batch in make_batches(whole, 5):
        whole.update(batch)
        parts.update(batch)
        assert float(parts.grad_norm) == pytest.approx(float(whole.grad_norm), rel=1e-4)
    assert float(parts.loss_sum) == pytest.approx(float(whole.loss_sum), rel=1e-5)
    assert_same_weights(whole.denoiser, parts.denoiser, atol=1e-5, rtol=0)


def test_accumulation_needs_less_at_a_time():
    sizes = []

    def loss(model, batch):
        sizes.append(len(batch.x))
        return teacher_loss(model, batch)

    updater = make_updater(loss, accumulate=4)
    updater.update(make_batches(updater, 1)[0])
    assert sizes == [4, 4, 4, 4]


@pytest.mark.parametrize("clip_norm", [0.0, 0.01])
def test_gradient_clipping(clip_norm):
    updater = make_updater(clip_norm=clip_norm)
    step, norms = updater.optimizer.step, []

    def watched():
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in updater.parameters)))
        step()

    updater.optimizer.step = watched
    logged = []
    for batch in make_batches(updater, 3):
        updater.update(batch)
        logged.append(float(updater.grad_norm))
    assert min(logged) > 0.01  # else nothing would be clipped
    assert norms == pytest.approx([clip_norm] * 3 if clip_norm else logged, rel=1e-3)


def test_ema_equals_a_loop_by_hand():
    updater = make_updater(ema=0.4, lr=0.01)  # the warm-up ends at update 6
    expected = [p.detach().clone() for p in updater.parameters]
    for n, batch in enumerate(make_batches(updater, 12)):
        updater.update(batch)
        decay = min(0.4, (1 + n) / (10 + n))
        expected = [decay * a + (1 - decay) * p.detach() for a, p in zip(expected, updater.parameters, strict=True)]
        for found, wanted in zip(updater.averaged.parameters(), expected, strict=True):
            torch.testing.assert_close(found.detach(), wanted, atol=1e-6, rtol=1e-5)
    assert not any(torch.equal(a, p) for a, p in zip(expected, updater.parameters, strict=True))


def test_ema_is_no_part_of_the_gradient_graph():
    """Else every update keeps its own graph alive, and the average cannot be copied."""
    updater = make_updater(ema=0.9)
    for batch in make_batches(updater, 2):
        updater.update(batch)
    assert all(p.is_leaf and not p.requires_grad for p in updater.averaged.parameters())


def test_ema_is_saved_sampled_and_returned(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(loop, "preview", lambda model, *args, **kwargs: shown.append(model))
    result = fit(tmp_path / "run", ema=0.9)
    folder = checkpoint.find(tmp_path / "run")
    _, state = checkpoint.load_state(folder)
    saved = checkpoint.load(folder).network.state_dict()
    assert shown and all(model is result for model in shown)
    for key, value in result.network.state_dict().items():
        assert torch.equal(saved[key], value) and torch.equal(state[f"ema/{key}"], value)
    assert not torch.equal(state["weights/conv_in.weight"], saved["conv_in.weight"])


def test_without_ema_the_weights_are_saved(tmp_path):
    result = fit(tmp_path / "run", ema=0.0)
    assert_same_weights(result, checkpoint.load(tmp_path / "run"), atol=0, rtol=0)


@pytest.mark.parametrize(("weight_decay", "kind"), [(0.0, torch.optim.Adam), (0.1, torch.optim.AdamW)])
def test_weight_decay_is_decoupled(weight_decay, kind):
    updater = make_updater(lambda model, batch: 0 * teacher_loss(model, batch), weight_decay=weight_decay, lr=0.5)
    assert type(updater.optimizer) is kind
    before = [p.detach().clone() for p in updater.parameters]
    updater.update(make_batches(updater, 1)[0])
    for old, new in zip(before, updater.parameters, strict=True):  # the gradient is 0: only decay changes weights
        torch.testing.assert_close(new.detach(), old * (1 - 0.5 * weight_decay))


def test_bf16_is_an_autocast_of_float32_weights(tmp_path):
    seen = []

    def loss(model, batch):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return teacher_loss(model, batch)

    model = fit(tmp_path / "bf16", loss=loss, precision="bf16", ema=0.9)
    assert set(seen) == {(True, torch.bfloat16)}
    weights = checkpoint.load(tmp_path / "bf16").network.state_dict()
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())
    plain = fit(tmp_path / "fp32", ema=0.9)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    losses = [read_log(tmp_path / precision)[-1]["loss"] for precision in ("bf16", "fp32")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    kwargs = {"updates": 4, "dropout": 0.3}
    plain = fit(tmp_path / "plain", **kwargs)
    saving = fit(tmp_path / "saving", gradient_checkpointing=True, **kwargs)
    assert_same_weights(plain, saving, atol=1e-6, rtol=0)


def test_dropout_option_reaches_the_network(tmp_path):
    seen = set()

    def loss(model, batch):
        seen.update(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))
        assert model.training
        return teacher_loss(model, batch)

    model = fit(tmp_path / "run", loss=loss, dropout=0.25, updates=1)
    assert seen == {0.25} and not model.training


def test_compile_keeps_the_names_of_the_weights(tmp_path, monkeypatch):
    """With the backend `eager`, which traces as the others do but needs no C++ compiler and little time."""
    compiled = []

    def compile_(module, **kwargs):
        compiled.append(type(module).__name__)
        return real(module, backend="eager", **kwargs)

    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    model = fit(tmp_path / "compiled", compile=True, updates=3, save_every=2)
    plain = fit(tmp_path / "plain", updates=3, save_every=2)
    torch._dynamo.reset()
    assert compiled == ["UNet"]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_same_weights(checkpoint.load(tmp_path / "compiled"), plain, atol=1e-5, rtol=0)


def test_run_seed_differs_by_name_and_seed():
    seeds = {run_seed(seed, name) for seed in range(5) for name in ("teacher", "stage1", "steps-2", "steps-1")}
    assert len(seeds) == 20 and all(0 <= seed < 1 << 64 for seed in seeds)
    assert run_seed(3, "steps-1") == run_seed(3, "steps-1")


def test_batches_and_noise_differ_between_runs_of_one_seed(tmp_path):
    seen = {}

    def loss(model, batch):
        seen.setdefault(batch.seed, batch.x.clone())
        return teacher_loss(model, batch)

    for name in ("steps-2", "steps-1"):
        fit(tmp_path / name, loss=loss, name=name, updates=1)
    first, second = seen.values()
    assert not torch.equal(first, second)


# --- what is written ---


def test_log_pictures_and_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "preview", functools.partial(REAL_PREVIEW, steps=2, columns=3))
    fit(tmp_path / "run", updates=10, log_every=3, save_every=2, keep=2, lr=0.01)
    rows = read_log(tmp_path / "run")
    assert [row["update"] for row in rows] == [3, 6, 9, 10]
    for row in rows:
        assert set(row) == {
            "run",
            "update",
            "images",
            "kimg",
            "loss",
            "loss_quarters",
            "grad_norm",
            "lr",
            "images_per_second",
            "time",
            "memory_gb",
        }
        assert row["run"] == "run" and row["images"] == 16 * row["update"] and 0.05 < row["memory_gb"] < 100
        assert 0 < row["loss"] < 2 and row["grad_norm"] > 0 and row["images_per_second"] > 0
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-0000008", "checkpoint-0000010"]
    pictures = sorted((tmp_path / "run").glob("samples-*.png"))
    assert [p.name for p in pictures] == [f"samples-run-{n:07d}.png" for n in (2, 4, 6, 8, 10)]
    with Image.open(pictures[0]) as image:
        assert image.height > 3 * image.width  # 10 rows, one a class, and 3 columns
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"]["lr"] == 0.01 and config["data_fingerprint"] == DATASET.fingerprint
    assert set(config["versions"]) == {"fastdiff", "python", "torch", "numpy"} and config["device"]


def test_logged_loss_is_the_mean_since_the_last_line(tmp_path):
    losses = []

    def loss(model, batch):
        losses.append(teacher_loss(model, batch))
        return losses[-1]

    fit(tmp_path / "run", loss=loss, updates=10, log_every=4)
    means = [float(value.detach().mean()) for value in losses]
    expected = [sum(means[:4]) / 4, sum(means[4:8]) / 4, sum(means[8:]) / 2]
    assert [row["loss"] for row in read_log(tmp_path / "run")] == pytest.approx(expected, rel=1e-5)


def test_preview_leaves_the_model_as_it_was(tmp_path):
    model = Denoiser(CONFIG).train()
    state = torch.get_rng_state()
    REAL_PREVIEW(model, tmp_path / "a.png", 0, columns=2, steps=1)
    assert model.training and torch.equal(state, torch.get_rng_state())


# --- stopping and continuing ---

CASES = {
    "average and dropout": {"ema": 0.9, "dropout": 0.3, "flip": True, "warmup": 3, "accumulate": 2},
    "decay, no average": {"weight_decay": 0.1, "anneal": "none"},
    "bf16": {"precision": "bf16", "dropout": 0.3},
}


def stop_at(update, accumulate=1):
    """A loss that is interrupted in this update."""
    calls = iter(range(10**6))

    def loss(model, batch):
        if next(calls) == (update - 1) * accumulate:
            raise KeyboardInterrupt
        return teacher_loss(model, batch)

    return loss


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_continues_bit_for_bit(tmp_path, case):
    kwargs = CASES[case] | {"save_every": 3, "log_every": 2}
    whole = fit(tmp_path / "whole", **kwargs)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", loss=stop_at(8, kwargs.get("accumulate", 1)), **kwargs)
    assert checkpoint.find(tmp_path / "parts").name == "checkpoint-0000006"
    continued = fit(tmp_path / "parts", resume=True, **kwargs)
    assert_same_weights(whole, continued, atol=0, rtol=0)
    states = [checkpoint.load_state(checkpoint.find(tmp_path / name)) for name in ("whole", "parts")]
    assert states[0][0] == states[1][0]
    assert states[0][1].keys() == states[1][1].keys()
    assert all(torch.equal(value, states[1][1][key]) for key, value in states[0][1].items())


def test_a_loss_may_draw_from_any_generator(tmp_path):
    """Python's, NumPy's (both keep a second normal for the next call) and PyTorch's go on where they were."""

    def draw(model, batch):
        weight = random.gauss(1, 0.1) + np.random.normal(0, 0.1) + float(torch.randn(()))
        return teacher_loss(model, batch) * weight

    def seed():
        random.seed(1), np.random.seed(2), torch.manual_seed(3)

    updates = iter(range(10**6))

    def stopped(model, batch):
        if next(updates) == 7:
            raise KeyboardInterrupt
        return draw(model, batch)

    seed()
    whole = fit(tmp_path / "whole", loss=draw, save_every=3)
    seed()
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", loss=stopped, save_every=3)
    random.seed(4), np.random.seed(5)
    continued = fit(tmp_path / "parts", loss=draw, resume=True, save_every=3)
    assert_same_weights(whole, continued, atol=0, rtol=0)


def test_a_batch_that_was_made_ahead_is_not_skipped():
    ahead = ImageBatches(DATASET, make_options("nowhere"), 7, torch.device("cpu"))
    plain = data.Batches(DATASET, 16, seed=7)
    for position in range(3):
        assert ahead.state() == plain.state()
        assert torch.equal(next(ahead).sample_ids, next(plain).sample_ids), position
    state = ahead.state()
    following = next(ahead).sample_ids
    next(ahead)
    ahead.restore(state)
    assert ahead.state() == state and torch.equal(next(ahead).sample_ids, following)


def test_the_log_after_resuming_is_that_of_a_run_that_was_not_stopped(tmp_path):
    kwargs = {"save_every": 3, "log_every": 4}
    fit(tmp_path / "whole", **kwargs)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", loss=stop_at(7), **kwargs)  # the last checkpoint is update 6, the last line update 4
    fit(tmp_path / "parts", resume=True, **kwargs)
    keys = ("run", "update", "images", "loss", "lr")
    logs = [[[row[key] for key in keys] for row in read_log(tmp_path / name)] for name in ("whole", "parts")]
    assert [row[1] for row in logs[1]] == [4, 8, 12]
    for whole, parts in zip(*logs, strict=True):
        assert parts == [whole[0], whole[1], whole[2], pytest.approx(whole[3], rel=1e-6), whole[4]]


def test_resuming_does_only_what_is_left(tmp_path):
    calls = []

    def loss(model, batch):
        calls.append(1)
        return teacher_loss(model, batch)

    fit(tmp_path / "run", loss=loss, updates=4)
    fit(tmp_path / "run", loss=loss, updates=4, resume=True)
    assert len(calls) == 4
    fit(tmp_path / "run", loss=loss, updates=6, resume=True)  # more updates may be asked for
    assert len(calls) == 6


def test_an_unfinished_write_is_ignored_when_resuming(tmp_path):
    fit(tmp_path / "run", updates=4, save_every=2)
    newest = checkpoint.find(tmp_path / "run")
    newest.rename(newest.with_name(f".{newest.name}.writing"))
    result = fit(tmp_path / "run", updates=4, save_every=2, resume=True)
    assert_same_weights(result, fit(tmp_path / "again", updates=4, save_every=2), atol=0, rtol=0)


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
def test_resuming_from_a_damaged_state_says_so(tmp_path, file):
    fit(tmp_path / "run", updates=2)
    path = checkpoint.find(tmp_path / "run") / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=file):
        fit(tmp_path / "run", updates=4, resume=True)


# --- when training goes wrong ---


def bad_from(update, *, value=float("nan"), last=10**6):
    calls = iter(range(1, 10**6))

    def loss(model, batch):
        here = teacher_loss(model, batch)
        return here * value if update <= next(calls) <= last else here

    loss.calls = calls
    return loss


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("update", [1, 12, 14, 20, 21])  # at 14 and 21 it would be saved
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, update, value):
    loss = bad_from(update, value=value)
    with pytest.raises(UserError, match=rf"update {update} .*--resume") as caught:
        fit(tmp_path / "run", loss=loss, updates=40, save_every=7)
    assert str(tmp_path / "run") in str(caught.value)
    assert next(loss.calls) - 1 <= update + 9
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == [f"checkpoint-{n:07d}" for n in range(7, update, 7)]
    for name in kept:
        weights = checkpoint.load(tmp_path / "run" / name).network.state_dict()
        assert all(value.isfinite().all() for value in weights.values())


def test_one_bad_loss_among_accumulated_parts_is_seen(tmp_path):
    with pytest.raises(UserError, match="update 3 "):
        fit(tmp_path / "run", loss=bad_from(10, last=10), updates=20, accumulate=4)


def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(tmp_path):
    """The loss can be finite where its gradient is not, and then the next weights are lost."""
    calls = iter(range(1, 100))

    def loss(model, batch):
        here = teacher_loss(model, batch)
        return here + (here.detach() - here).abs().sqrt() if next(calls) == 10 else here  # √ has no slope at 0

    with pytest.raises(UserError, match="10"):
        fit(tmp_path / "run", loss=loss, updates=20, save_every=5, keep=5)
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        weights = checkpoint.load(folder).network.state_dict()
        assert all(value.isfinite().all() for value in weights.values()), folder.name


def test_a_run_stopped_by_a_bad_loss_can_be_continued(tmp_path):
    whole = fit(tmp_path / "whole", updates=20, save_every=10)
    with pytest.raises(UserError):
        fit(tmp_path / "parts", loss=bad_from(14), updates=20, save_every=10)
    assert_same_weights(whole, fit(tmp_path / "parts", updates=20, save_every=10, resume=True), atol=0, rtol=0)


# --- options and folders ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("updates", 0),
        ("batch_size", -1),
        ("accumulate", 0),
        ("lr", 0.0),
        ("lr", -1.0),
        ("save_every", 0),
        ("log_every", 0),
        ("keep", 0),
        ("warmup", -1),
        ("weight_decay", -0.1),
        ("clip_norm", -1.0),
        ("seed", -1),
        ("ema", 1.0),
        ("ema", -0.1),
        ("accumulate", 3),
    ],
)
def test_options_without_sense_are_refused(name, value):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} "):
        make_options("unused", **{name: value})


@pytest.mark.parametrize(("name", "value"), [("dropout", 1.5), ("dropout", -0.1), ("lr", math.nan), ("device", "tpu")])
def test_options_that_torch_would_stumble_over_are_refused(name, value):
    with pytest.raises(UserError, match=f"--{name}"):
        make_options("unused", **{name: value})


def test_resume_and_overwrite_contradict_each_other():
    with pytest.raises(UserError, match="--resume and --overwrite"):
        make_options("unused", resume=True, overwrite=True)


def test_overwrite_starts_again_and_leaves_other_files(tmp_path):
    fit(tmp_path / "run", updates=6, save_every=2, keep=3)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "steps-4").mkdir()
    fit(tmp_path / "run", updates=3, overwrite=True)
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == ["checkpoint-0000003", "config.json", "metrics.jsonl", "notes.txt"]
    assert [row["update"] for row in read_log(tmp_path / "run")] == [3]


def test_a_folder_made_empty_before_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    fit(tmp_path / "run", updates=1)
    assert checkpoint.find(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")


# --- signals, and what a later version knows of an earlier one's runs ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_run_goes_on_exactly(tmp_path, capsys, number):
    def loss(model, batch):
        if int(batch.sample_ids[0]) == 16 * 6:
            os.kill(os.getpid(), number)
        return teacher_loss(model, batch)

    before = signal.getsignal(number)
    whole = fit(tmp_path / "whole", ema=0.9, log_every=2, save_every=5)
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path / "parts", loss=loss, ema=0.9, log_every=2, save_every=5)
    assert not stopped.value.code and signal.getsignal(number) is before
    assert "stopped after update 7 of 12" in capsys.readouterr().out
    assert (tmp_path / "parts" / "checkpoint-0000007").is_dir()
    continued = fit(tmp_path / "parts", ema=0.9, log_every=2, save_every=5, resume=True)
    assert_same_weights(whole, continued, atol=0, rtol=0)
    measured = ("time", "images_per_second", "memory_gb")  # of the process that ran, not of the run
    logs = [[{k: v for k, v in row.items() if k not in measured} for row in read_log(tmp_path / p)] for p in PLACES]
    assert logs[0] == logs[1]


def test_a_second_signal_ends_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.asked(1) and not ended
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [128 + signal.SIGTERM]


def test_what_was_logged_after_the_checkpoint_is_forgotten(tmp_path):
    out = tmp_path / "run"
    whole = fit(tmp_path / "whole", log_every=1, save_every=5)
    with pytest.raises(KeyboardInterrupt):
        fit(out, loss=stop_at(8), log_every=1, save_every=5)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"run": "run", "upd')  # cut off by a crash
    assert_same_weights(whole, fit(out, log_every=1, save_every=5, resume=True), atol=0, rtol=0)
    assert [row["update"] for row in read_log(out)] == list(range(1, 13))


def test_options_that_an_earlier_version_lacked_had_their_defaults(tmp_path):
    out = tmp_path / "run"
    fit(out, updates=2)
    config = json.loads((out / "config.json").read_text())
    del config["options"]["betas"]
    (out / "config.json").write_text(json.dumps(config))
    fit(out, updates=3, resume=True)
    del config["options"]["ema"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"--ema was 0\.0, is 0\.5"):
        fit(out, updates=4, resume=True, ema=0.5)


def test_a_run_goes_on_where_the_preset_alone_is_another(tmp_path):
    """Earlier versions wrote "digits" where none was given; what a preset sets is compared option by option."""
    fit(tmp_path / "run", updates=2, preset="digits")
    fit(tmp_path / "run", updates=3, resume=True)
    assert [row["update"] for row in read_log(tmp_path / "run")] == [2, 3]


def test_a_signal_that_comes_while_an_update_is_logged_stops_after_the_next_one(tmp_path, monkeypatch, capsys):
    """Whatever is told to be saved is."""
    log = loop._log

    def late(updaters, *rest):
        if updaters[-1].update_count == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        log(updaters, *rest)

    monkeypatch.setattr(loop, "_log", late)
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", log_every=2, save_every=5)
    told = capsys.readouterr().out
    (update,) = [n for n in range(1, 13) if f"stopped after update {n} of 12" in told]
    assert (tmp_path / "run" / f"checkpoint-{update:07d}").is_dir()


# --- TensorBoard ---


class Board:
    """TensorBoard's writer: a file that is open from the first value until it is closed."""

    made = None

    def __init__(self, folder):
        self.values, self.folder, self.closed = [], Path(folder), False
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "events").touch()
        self.made.append(self)

    def add_scalar(self, key, value, images):
        assert not self.closed
        self.values.append((key, value, images))

    def flush(self):
        assert (self.folder / "events").exists(), "the run was replaced under it"

    def close(self):
        self.closed = True


def test_tensorboard_gets_the_numbers_and_is_closed_before_the_run_may_be_replaced(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Board))
    monkeypatch.setattr(Board, "made", [])
    for overwrite in (False, True):
        fit(tmp_path / "run", updates=2, log_every=1, overwrite=overwrite)
    first, second = Board.made
    rows = read_log(tmp_path / "run")
    assert [v for v in second.values if v[0].endswith("/loss")] == [
        (f"{row['run']}/loss", row["loss"], row["images"]) for row in rows
    ]
    assert first.closed and second.closed and first.folder == tmp_path / "run/tensorboard"
