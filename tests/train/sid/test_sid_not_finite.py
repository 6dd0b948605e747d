"""Samples of SiD whose loss is not finite."""

import math
from pathlib import Path

import command_lines
import pytest
import torch
from common import assert_same_weights
from sid_runs import learning, lines_of, train

from fastdiff import checkpoint
from fastdiff.errors import UserError
from fastdiff.generate import Sampling, generate
from fastdiff.losses import sid

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def break_from(monkeypatch, update, share, *, which="generator"):
    """From an update on, this share of a loss is not a number."""
    real, calls = getattr(sid, which), iter(range(1, 10**6))

    def breaking(*arguments, **options):
        result, bad = real(*arguments, **options), next(calls) >= update
        loss, others = result if isinstance(result, tuple) else (result, None)
        rows = torch.arange(len(loss)) < round(share * len(loss)) * bad
        loss = torch.where(rows, math.nan, loss)
        return loss if others is None else (loss, others)

    monkeypatch.setattr(sid, which, breaking)


@pytest.mark.parametrize("which", ["generator", "fake_score"])
def test_too_many_samples_that_are_not_finite_end_the_run(models, tmp_path, monkeypatch, which):
    """The last good checkpoint is there, can be sampled, and continued."""
    monkeypatch.setattr("train.updater.MANY_SAMPLES", 64)
    options = {"updates": 9, "save_every": 4, "log_every": 8, "ema": 0.9}
    with monkeypatch.context() as patch:
        break_from(patch, 5, 0.5, which=which)
        with pytest.raises(UserError, match=r"not finite .*--resume") as caught:
            train(models / "guided", tmp_path / "run", **options)
    assert "32 of 64 samples" in str(caught.value) and str(tmp_path / "run") in str(caught.value)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-0000004"]
    images = next(generate(checkpoint.load(tmp_path / "run"), 4, Sampling(guidance=1.0, steps=1, sampler="one_step")))
    assert images.isfinite().all()
    result = train(models / "guided", tmp_path / "run", resume=True, **options)
    assert_same_weights(result, train(models / "guided", tmp_path / "whole", **options), atol=0, rtol=0)


def test_through_the_command_line_that_is_one_sentence(models, tmp_path, monkeypatch, run):
    monkeypatch.setattr("train.updater.MANY_SAMPLES", 16)
    break_from(monkeypatch, 1, 1.0)
    result = run(
        "sid",
        "--teacher",
        models / "guided",
        "--out",
        "o",
        "--device",
        "cpu",
        "--batch-size",
        "16",
        "--updates",
        "20",
        "--log-every",
        "10",
    )
    assert result.code == 2 and "Traceback" not in result.err
    assert result.err.strip().splitlines()[-1].startswith("error: the losses of 160 of 160 samples were not finite")
    assert not list(Path("o").glob("checkpoint-*"))


def test_a_few_samples_that_are_not_finite_are_left_out_and_counted(models, tmp_path, monkeypatch):
    """One in each of five updates; and every line of the log is JSON, which knows no NaN."""
    break_from(monkeypatch, 1, 1 / 16)
    model = train(models / "guided", tmp_path / "run", updates=5, save_every=5, log_every=5)
    assert all(value.isfinite().all() for value in model.parameters())
    _, tensors = checkpoint.load_state(checkpoint.find(tmp_path / "run"))
    assert int(tensors["dropped"]) == 5 and int(tensors["fake_dropped"]) == 0
    (row,) = lines_of(tmp_path / "run/metrics.jsonl")
    assert math.isfinite(row["loss"])


@pytest.mark.parametrize(("updates", "allowed"), [(1, 100), (625, 100), (1250, 200)])
def test_samples_that_are_not_finite_may_be_one_in_a_hundred(models, updates, allowed):
    """Of those since the last look, or of 10,000: one bad sample among the first few is no reason to stop."""
    _, _, generator, _ = learning(models / "teacher")
    for dropped in (allowed, allowed + 1):
        generator.update_count, generator.watched_from = updates, 0
        generator.dropped.fill_(dropped)
        if dropped > allowed:
            with pytest.raises(UserError, match=f"{dropped} of {16 * updates} samples"):
                generator.check_finite()
        else:
            generator.check_finite()
            forgiven = updates >= 625
            assert int(generator.dropped) == (0 if forgiven else dropped)
            assert generator.watched_from == (updates if forgiven else 0)
