"""Scores of a generator while it learns, alarms, and the best one."""

import math
import shutil
from types import SimpleNamespace

import command_lines
import numpy as np
import pytest
import torch
from common import assert_same_weights
from sid_runs import lines_of, same, train

from fastdiff import checkpoint
from fastdiff import evaluate as evaluation
from train import sid as recipe

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def test_scores_are_written_at_every_save(made):
    rows = lines_of(made / "scores.jsonl")
    assert [(row["run"], row["update"], row["images"]) for row in rows] == [("sid", 3, 48), ("sid", 6, 96)]
    for row in rows:
        assert [score["guidance"] for score in row["scores"]] == [0.0, 4.0]  # 9 is not learned
        assert row["fd"] == pytest.approx(np.mean([score["fd"] for score in row["scores"]]), abs=1e-3) and row["fd"] > 0
        assert row["spread"] > 0 and 0 <= row["near_duplicates"] <= 1 and isinstance(row["alarms"], list)


def scripted(monkeypatch, distances):
    """Scores without scoring: the distances in turn."""
    stream = iter(distances)
    monkeypatch.setattr(recipe.Reference, "load", lambda *args, **kwargs: object())

    def scored(model, reference, sampling, **others):
        return SimpleNamespace(guidance=sampling.guidance, fd=next(stream), score=1.0)

    monkeypatch.setattr(recipe, "evaluate", scored)


def same_weights(first, second):
    return same(checkpoint.load(first).network, checkpoint.load(second).network.state_dict())


@pytest.mark.parametrize(("distances", "winner"), [([5.0, 2.0, 3.0], 4), ([2.0, 2.0, 2.0], 2)])
def test_the_best_checkpoint_is_kept(models, tmp_path, monkeypatch, distances, winner):
    scripted(monkeypatch, distances)
    out = tmp_path / "run"
    train(models / "teacher", out, data="digits", save_every=2, keep=3, lr=1e-2)
    equal = [n for n in (2, 4, 6) if same_weights(out / "best", out / f"checkpoint-{n:07d}")]
    assert equal == [winner]
    best = checkpoint.load(out / "best")
    assert best.config.kind == "sid" and best.config.sigma_init == 2.5
    assert [row["fd"] for row in lines_of(out / "scores.jsonl")] == distances


def test_the_best_of_an_interrupted_run_stays_the_best(models, tmp_path, monkeypatch):
    """Even when its own checkpoint is long gone."""
    scripted(monkeypatch, [1.0, 2.0, 3.0])
    out, options = tmp_path / "run", {"data": "digits", "save_every": 2, "keep": 1, "lr": 1e-2}
    train(models / "teacher", out, updates=2, **options)
    shutil.copytree(checkpoint.find(out), tmp_path / "first")
    train(models / "teacher", out, updates=6, resume=True, **options)
    assert same_weights(out / "best", tmp_path / "first") and not same_weights(out, tmp_path / "first")


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_what_is_scored_is_what_is_saved_in_eval_mode(models, tmp_path, monkeypatch, ema):
    """Dropout has no place in a score."""
    seen, real = [], recipe.generate

    def spy(model, labels, sampling):
        dropout = (part.training for part in model.modules() if isinstance(part, torch.nn.Dropout))
        seen.append((sampling.sampler, any(dropout)))
        return real(model, labels, sampling)

    monkeypatch.setattr(recipe, "generate", spy)
    train(models / "teacher", tmp_path / "run", ema=ema, dropout=0.5, updates=2, save_every=1)
    assert seen == [("ddim", False), ("one_step", False), ("one_step", False)]


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_scoring_changes_nothing_of_what_is_learned(models, tmp_path, monkeypatch, ema):
    scripted(monkeypatch, range(100))
    options = {"ema": ema, "dropout": 0.5, "updates": 3, "lr": 1e-3}
    often = train(models / "guided", tmp_path / "often", save_every=1, data="digits", **options)
    once = train(models / "guided", tmp_path / "once", save_every=3, **options)
    assert_same_weights(often, once, atol=0, rtol=0)


def test_a_collapse_is_told(models, tmp_path, monkeypatch, capsys):
    """Not before the second score: a generator starts with little variety, and gains it."""
    train(models / "guided", tmp_path / "well", lr=1e-12)
    assert not any("near-duplicate" in a for row in lines_of(tmp_path / "well/scores.jsonl") for a in row["alarms"])
    real = recipe.generate

    def collapsed(model, labels, sampling):
        for images in real(model, labels, sampling):
            yield images[:1].expand_as(images) if sampling.sampler == "one_step" else images

    monkeypatch.setattr(recipe, "generate", collapsed)
    capsys.readouterr()
    train(models / "guided", tmp_path / "run", lr=1e-12)
    first, second = lines_of(tmp_path / "run/scores.jsonl")
    assert first["spread"] == second["spread"] == 0 and first["near_duplicates"] == second["near_duplicates"] == 1
    assert len(first["alarms"]) == 1 and "near-duplicate" in first["alarms"][0]
    assert len(second["alarms"]) == 2 and "varies 0.00 times" in second["alarms"][0]
    assert capsys.readouterr().out.count("warning: collapse?") == 3


@pytest.mark.parametrize("num", [2, 11])
def test_few_images_are_enough_for_a_score(models, tmp_path, num):
    train(models / "guided", tmp_path / "run", score_num=num, updates=2, save_every=1)
    assert all(math.isfinite(row["spread"]) for row in lines_of(tmp_path / "run/scores.jsonl"))


def test_an_unconditional_generator_is_scored_on_data_with_labels(models, extractor, tmp_path):
    train(models / "unconditional", tmp_path / "run", data="digits", updates=1)
    (row,) = lines_of(tmp_path / "run/scores.jsonl")
    assert row["fd"] > 0 and checkpoint.load(tmp_path / "run/best").config.kind == "sid"


def test_data_without_labels_serve_no_distance(models, tmp_path):
    images = command_lines.write_images(tmp_path / "images", classes=(), channels=1)
    train(models / "unconditional", tmp_path / "run", data=str(images), updates=1)
    (row,) = lines_of(tmp_path / "run/scores.jsonl")
    assert "fd" not in row and row["spread"] > 0


@pytest.mark.parametrize("where", [recipe, evaluation])
def test_images_that_are_not_finite_have_no_scores_and_training_goes_on(
    models, extractor, tmp_path, monkeypatch, where
):
    real = where.generate

    def breaking(model, labels, sampling, **how):
        for images in real(model, labels, sampling, **how):
            yield images * (math.nan if sampling.sampler == "one_step" else 1)

    with monkeypatch.context() as patch:
        patch.setattr(where, "generate", breaking)
        train(models / "guided", tmp_path / "run", data="digits", updates=2, save_every=1)
    rows = lines_of(tmp_path / "run/scores.jsonl")
    assert all("fd" not in row and "not finite" in row["alarms"][-1] for row in rows) and len(rows) == 2
    assert not (tmp_path / "run/best").exists()
    train(models / "guided", tmp_path / "run", data="digits", updates=3, save_every=1, resume=True)
    assert lines_of(tmp_path / "run/scores.jsonl")[-1]["fd"] > 0
