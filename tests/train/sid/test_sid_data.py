"""The data that score a generator, and the classes that it is asked for."""

import json

import command_lines
import numpy as np
import pytest
import torch
from scipy import stats
from sid_runs import CPU, iterate, learning, lines_of, make_options, train

import kernels
from fastdiff import data, metrics
from fastdiff.losses.batch import GUIDANCE, TIME
from train import sid as recipe

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def test_no_image_is_read_without_data(models, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a data set was read")

    for name in ("load", "Batches"):
        monkeypatch.setattr(data, name, refuse)
    monkeypatch.setattr(metrics, "load_extractor", refuse)
    train(models / "teacher", tmp_path / "run")
    assert json.loads((tmp_path / "run/config.json").read_text())["data_fingerprint"] is None
    assert all("fd" not in row for row in lines_of(tmp_path / "run/scores.jsonl"))
    assert not (tmp_path / "run/best").exists()


def drawn(**changes):
    return next(recipe.DrawnBatches(10, make_options("unused", batch_size=20_000, **changes), CPU)).label


def test_classes_are_drawn_uniformly():
    counts = drawn().bincount(minlength=10).numpy()
    assert len(counts) == 10 and stats.chisquare(counts).pvalue > 0.01


def test_classes_are_drawn_by_their_frequencies():
    frequencies = np.array([0, 3, 1, 0, 2, 0.5, 0, 10, 1e-9, 0])
    counts = drawn(class_frequencies=tuple(frequencies)).bincount(minlength=10).numpy()
    assert len(counts) == 10 and (counts[frequencies == 0] == 0).all()
    often = frequencies > 0.1
    assert counts[often].sum() >= 19_999
    expected = frequencies[often] / frequencies[often].sum() * counts[often].sum()
    assert stats.chisquare(counts[often], expected).pvalue > 0.01
    only = drawn(class_frequencies=(0.0,) * 9 + (7.0,))
    assert (only == 9).all()


def test_a_class_that_is_never_wanted_is_not_drawn_at_the_edge_of_another(monkeypatch):
    draws = torch.tensor([0.0, 0.25, 0.5, 1 - 2**-24])  # the first and the last that there are
    monkeypatch.setattr(kernels, "rand", lambda *arguments, **options: draws)
    frequencies = (0.0, 1.0, 0.0, 1.0, 2.0, 0.0)
    batches = recipe.DrawnBatches(6, make_options("unused", batch_size=4, class_frequencies=frequencies), CPU)
    assert next(batches).label.tolist() == [1, 3, 4, 4]


def test_a_class_depends_on_the_sample_id_and_the_seed_alone():
    labels = drawn()
    small = recipe.DrawnBatches(10, make_options("unused", batch_size=7), CPU)
    parts = [next(small) for _ in range(5)]
    assert torch.equal(torch.cat([part.sample_ids for part in parts]), torch.arange(35))
    assert torch.equal(torch.cat([part.label for part in parts]), labels[:35])
    assert not torch.equal(drawn(seed=1), labels)


@pytest.mark.parametrize("which", [TIME, GUIDANCE])
def test_a_class_says_nothing_of_noise_level_and_strength(which):
    batch = next(recipe.DrawnBatches(10, make_options("unused", batch_size=20_000), CPU))
    tenth = (10 * batch.uniform(which)).long()
    counts = torch.zeros(10, 10).index_put((tenth, batch.label), torch.ones(20_000), accumulate=True)
    assert stats.chi2_contingency(counts.numpy()).pvalue > 0.01


def test_the_stream_of_classes_goes_on_where_it_stopped():
    whole, before, after = (recipe.DrawnBatches(10, make_options("unused"), CPU) for _ in range(3))
    expected = [next(whole) for _ in range(4)]
    next(before), next(before)
    after.restore(json.loads(json.dumps(before.state())))
    for batch in expected[2:]:
        found = next(after)
        assert torch.equal(found.sample_ids, batch.sample_ids) and torch.equal(found.label, batch.label)
        assert found.seed == batch.seed and found.x is None


def test_no_two_updates_share_a_sample(models):
    """Fake score and generator learn on fresh images each."""
    _, *updaters, batches = learning(models / "teacher")
    seen = []
    for updater in updaters:
        loss = updater.loss
        updater.loss = lambda model, b, loss=loss: (seen.append(b.sample_ids), loss(model, b))[1]
    iterate(updaters, batches, 3)
    ids = torch.cat(seen)
    assert len(seen) == 6 and len(ids.unique()) == len(ids) == 6 * 16
