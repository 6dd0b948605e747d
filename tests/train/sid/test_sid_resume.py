"""A run of SiD that was stopped goes on as if it had not been."""

import shutil

import command_lines
import pytest
import torch
from common import snapshot
from sid_runs import lines_of, train

from fastdiff import checkpoint
from fastdiff.errors import UserError
from train import loop
from train import sid as recipe
from train.updater import Updater

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")

LONG = {"updates": 8, "save_every": 4, "log_every": 2, "lr": 1e-3, "ema": 0.9, "dropout": 0.3, "keep": 5}


def interrupt(monkeypatch, update):
    """Stop in the generator's part of an update, after the fake score's."""
    real = Updater.update

    def stopping(self, batch):
        if not self.name and self.update_count + 1 == update:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(Updater, "update", stopping)


def without_clocks(rows):
    return [
        {key: value for key, value in row.items() if key not in ("images_per_second", "time", "memory_gb")}
        for row in rows
    ]


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """A run that nothing stopped. Read it only."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "preview", lambda *args, **kwargs: None)
        patch.setattr(recipe, "COLLAPSED", 100.0)  # an alarm wherever there may be one
        train(models / "guided", out, **LONG)
    return out


@pytest.fixture(scope="module", params=[5, 7], ids=["right after a checkpoint", "after more lines of the log"])
def continued(request, models, tmp_path_factory):
    """The same run, stopped in an update and continued. Read it only."""
    out = tmp_path_factory.mktemp("continued") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "preview", lambda *args, **kwargs: None)
        patch.setattr(recipe, "COLLAPSED", 100.0)
        with patch.context() as stopping:
            interrupt(stopping, request.param)
            with pytest.raises(KeyboardInterrupt):
                train(models / "guided", out, **LONG)
        assert checkpoint.find(out).name == "checkpoint-0000004"
        train(models / "guided", out, resume=True, **LONG)
    return out


def test_a_continued_run_ends_bit_for_bit_as_a_whole_one(whole, continued):
    """Weights, average, both optimizers, the stream of samples, counters and random states."""
    for step in (4, 8):
        folders = [out / f"checkpoint-{step:07d}" for out in (whole, continued)]
        states = [checkpoint.load_state(folder) for folder in folders]
        assert states[0][0] == states[1][0] and states[0][1].keys() == states[1][1].keys()
        assert all(torch.equal(value, states[1][1][key]) for key, value in states[0][1].items())
        assert (folders[0] / "model.safetensors").read_bytes() == (folders[1] / "model.safetensors").read_bytes()


def test_a_continued_runs_log_is_that_of_a_whole_one(whole, continued):
    logs = [without_clocks(lines_of(out / "metrics.jsonl")) for out in (whole, continued)]
    assert [row["update"] for row in logs[0]] == [2, 4, 6, 8]
    assert logs[1] == logs[0]


def test_a_continued_runs_scores_are_those_of_a_whole_one(whole, continued):
    """Alarms too: what they compare with is no less true after an interruption."""
    scores = [lines_of(out / "scores.jsonl") for out in (whole, continued)]
    assert scores[0][1]["alarms"], "the whole run should have raised one"
    assert scores[1] == scores[0]


def test_other_options_cannot_continue_a_run(models, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    before = snapshot(tmp_path / "run")
    for change in (
        {"alpha": 1.0},
        {"fake_lr": 1e-5},
        {"data": "digits"},
        {"class_frequencies": (1.0,) * 10},
        {"seed": 1},
    ):
        with pytest.raises(UserError, match=f"--{next(iter(change)).replace('_', '-')} was"):
            train(models / "guided", tmp_path / "run", **(LONG | change), resume=True)
    assert snapshot(tmp_path / "run") == before


def test_a_run_is_never_overwritten_unasked(models, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(UserError, match="--resume"):
        train(models / "guided", tmp_path / "run", **LONG)
    (tmp_path / "run/best").mkdir()
    train(models / "guided", tmp_path / "run", overwrite=True, updates=1)
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == ["checkpoint-0000001", "config.json", "metrics.jsonl", "scores.jsonl"]
    assert len(lines_of(tmp_path / "run/scores.jsonl")) == 1
