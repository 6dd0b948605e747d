"""Scores against closed forms, the embedded extractor, and what `evaluate` counts."""

import itertools
import math
import struct
from dataclasses import asdict, replace

import numpy as np
import pytest
import scipy.linalg
import torch
from common import randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastdiff import checkpoint, data, metrics
from fastdiff import evaluate as evaluation
from fastdiff.denoiser import Denoiser, DenoiserConfig, Guided, with_guidance
from fastdiff.errors import UserError
from fastdiff.evaluate import Reference, evaluate, table
from fastdiff.generate import Sampling
from fastdiff.metrics import Moments, Row, frechet_distance, frechet_of_gaussians
from fastdiff.unet import UNetConfig


def gaussian(seed, width=6):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(width, generator=generator, dtype=torch.float64), root @ root.T / width


def closed_form(mean1, cov1, mean2, cov2):
    root = scipy.linalg.sqrtm(cov1.numpy() @ cov2.numpy()).real
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace()) - 2 * np.trace(root)


def features(count, seed=0, width=5, classes=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator), 3 * torch.randn(count, classes, generator=generator)


# --- Fréchet distance ---


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(1, 12))
def test_frechet_against_the_matrix_root(seed1, seed2, width):
    first, second = gaussian(seed1, width), gaussian(seed2 + 20_000, width)
    assert frechet_of_gaussians(*first, *second) == pytest.approx(closed_form(*first, *second), rel=1e-6, abs=1e-6)


def test_frechet_of_commuting_covariances():
    """With one basis it is Σ (√λ1 − √λ2)² more than the distance of the means."""
    basis = torch.linalg.qr(gaussian(5)[1]).Q
    values1, values2 = torch.tensor([4.0, 1, 9, 0, 2, 1]).double(), torch.tensor([1.0, 1, 4, 1, 0, 16]).double()
    (mean1, _), (mean2, _) = gaussian(1), gaussian(2)
    found = frechet_of_gaussians(mean1, basis * values1 @ basis.T, mean2, basis * values2 @ basis.T)
    expected = (mean1 - mean2).square().sum() + (values1.sqrt() - values2.sqrt()).square().sum()
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_frechet_is_a_distance():
    first, second = gaussian(1), gaussian(2)
    assert frechet_of_gaussians(*first, *first) == pytest.approx(0, abs=1e-9)
    assert frechet_of_gaussians(*first, *second) == pytest.approx(frechet_of_gaussians(*second, *first))
    assert frechet_of_gaussians(*first, *second) > 0.1


def test_frechet_of_a_translation():
    mean, cov = gaussian(3)
    shift = torch.arange(6).double()
    assert frechet_of_gaussians(mean, cov, mean + shift, cov) == pytest.approx(55.0)


def test_frechet_of_singular_covariances():
    mean, cov = gaussian(4)
    flat = torch.zeros_like(cov)
    assert frechet_of_gaussians(mean, cov, mean, flat) == pytest.approx(float(cov.trace()))
    moments = Moments().add(*features(3, width=20))  # fewer images than features
    assert frechet_distance(moments, moments) == pytest.approx(0, abs=1e-6)


# --- running sums ---


@pytest.mark.parametrize("sizes", [[100], [1, 99], [33, 33, 34]])
def test_moments_in_chunks_are_moments_at_once(sizes):
    values, logits = features(100)
    moments = Moments()
    for part_values, part_logits in zip(values.split(sizes), logits.split(sizes), strict=True):
        assert moments.add(part_values, part_logits) is moments
    assert moments.count == 100
    np.testing.assert_allclose(moments.mean, values.double().mean(0))
    np.testing.assert_allclose(moments.covariance, np.cov(values.double().numpy(), rowvar=False), rtol=1e-10)
    p = logits.double().softmax(1)
    expected = math.exp(float((p * (p.log() - p.mean(0).log())).sum(1).mean()))
    assert moments.score() == pytest.approx(expected)


def test_moments_keep_their_precision_far_from_zero():
    values, logits = features(200)
    far = Moments().add(values.double() + 1e4, logits)
    np.testing.assert_allclose(far.covariance, Moments().add(values, logits).covariance, atol=1e-5)


@given(st.integers(0, 1000), st.integers(2, 10), st.floats(0.01, 100))
def test_score_is_between_one_and_the_number_of_classes(seed, classes, scale):
    values, logits = features(50, seed, classes=classes)
    assert 1 - 1e-9 <= Moments().add(values, scale * logits).score() <= classes + 1e-9


def test_score_of_certain_and_of_constant_answers():
    values, _ = features(100)
    certain = 1000.0 * torch.eye(4).repeat(25, 1)
    assert Moments().add(values, certain).score() == pytest.approx(4)
    assert Moments().add(values, certain[:1].repeat(100, 1)).score() == pytest.approx(1)
    assert Moments().add(values, torch.zeros(100, 4)).score() == pytest.approx(1)
    half = torch.cat([certain[:1].repeat(50, 1), certain[1:2].repeat(50, 1)])
    assert Moments().add(values, half).score() == pytest.approx(2)


# --- the extractor ---


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """Twelve images of two classes, on which the extractor trains in a moment."""
    folder = tmp_path_factory.mktemp("data") / "small"
    for index, image in enumerate(np.random.default_rng(0).integers(0, 100, (12, 4, 4), dtype=np.uint8)):
        place = folder / "ab"[index % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image + 100 * np.uint8(index % 2)).save(place / f"{index}.png")
    return str(folder)


def scores(extractor, spec):
    dataset = data.load(spec)
    moments = extractor.of_dataset(dataset)
    noisy = extractor.add(Moments(), torch.linspace(-1, 1, 10 * 16).view(10, 1, 4, 4))
    return extractor.accuracy, frechet_distance(noisy, moments), moments.score()


def test_extractor_is_deterministic(small_data, tmp_path):
    torch.manual_seed(1)
    first = metrics.load_extractor(small_data, cache=tmp_path / "a")
    torch.manual_seed(2)
    second = metrics.load_extractor(small_data, cache=tmp_path / "b")
    assert scores(first, small_data) == scores(second, small_data)
    assert first.name == "classifier1/small" and not first.network.training


def test_extractor_is_cached_and_survives_damage(small_data, tmp_path, monkeypatch):
    trained = []

    def train(network, *splits):  # the same weights every time, without the work
        trained.append(1)
        randomize(network)
        return 0.75

    monkeypatch.setattr(metrics, "_train", train)
    first = metrics.load_extractor(small_data, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    assert len(trained) == 1
    assert scores(metrics.load_extractor(small_data, cache=tmp_path), small_data) == scores(first, small_data)
    assert len(trained) == 1
    for damaged in (b"", b"nonsense", whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        trained.clear()
        again = metrics.load_extractor(small_data, cache=tmp_path)
        assert trained and scores(again, small_data) == scores(first, small_data)
        assert file.read_bytes() == whole  # it is repaired


def test_a_cache_that_cannot_be_written_is_no_error(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_train", lambda *args: 0.5)
    (tmp_path / "file").write_text("in the way")
    assert metrics.load_extractor(small_data, cache=tmp_path / "file").accuracy == 0.5


def test_extractor_of_other_data_is_another(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_train", lambda *args: 0.5)
    metrics.load_extractor(small_data, cache=tmp_path / "cache")
    other = tmp_path / "small"
    for name in ("a", "b"):
        (other / name).mkdir(parents=True)
        for index in range(3):
            Image.new("L", (8, 8), 40 * index + ord(name)).save(other / name / f"{index}.png")
    metrics.load_extractor(str(other), cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("count", [3, 12])
def test_data_without_labels_have_no_extractor(tmp_path, count):
    (tmp_path / "images").mkdir()
    for index in range(count):
        Image.new("L", (8, 8), 20 * index).save(tmp_path / "images" / f"{index}.png")
    with pytest.raises(UserError, match="labels"):
        metrics.load_extractor(str(tmp_path / "images"))


def write_idx(folder, **arrays):
    folder.mkdir()
    for name, array in arrays.items():
        header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        kind = f"{name.replace('_', '-')}-idx{array.ndim}-ubyte"
        (folder / kind).write_bytes(header + array.astype(np.uint8).tobytes())


def test_without_a_test_split_a_part_of_the_training_data_is_held_out(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(metrics, "_train", lambda network, train, test: seen.append((train, test)) or 0.5)
    labels = np.arange(30) % 3
    write_idx(tmp_path / "mine", train_images=labels[:, None, None].repeat(8, 1).repeat(8, 2), train_labels=labels)
    metrics.load_extractor(str(tmp_path / "mine"), cache=tmp_path / "cache")
    ((train, test),) = seen
    assert len(train) + len(test) == 30 and 0 < len(test) < len(train)
    assert all((part.images[:, 0, 0, 0] == part.labels).all() for part in (train, test))


def test_a_damaged_test_split_is_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_train", lambda *args: 0.5)
    images, labels = np.zeros((20, 8, 8)), np.arange(20) % 2
    write_idx(tmp_path / "mine", train_images=images, train_labels=labels, t10k_images=images, t10k_labels=labels)
    path = tmp_path / "mine" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=path.name):
        metrics.load_extractor(str(tmp_path / "mine"), cache=tmp_path / "cache")


@pytest.fixture(scope="module")
def reference(extractor):
    return Reference.load("digits")


def test_extractor_of_digits_knows_digits(extractor, reference):
    assert extractor.accuracy > 0.97
    dataset = data.load("digits", "test")
    with torch.no_grad():
        _, logits = extractor.network(data.to_float(torch.from_numpy(dataset.images)))
    found = (logits.argmax(1).numpy() == dataset.labels).mean()
    assert found == pytest.approx(extractor.accuracy)
    assert 8 < reference.moments.score() <= 10


def test_noise_adds_to_the_distance(reference):
    images = data.to_float(torch.from_numpy(reference.dataset.images))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    distances = [
        frechet_distance(reference.extractor.add(Moments(), images + sigma * noise), reference.moments)
        for sigma in (0, 0.1, 0.2, 0.4, 0.8, 1.6)
    ]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert all(b > a + 1e-3 for a, b in itertools.pairwise(distances))
    assert distances[-1] > 10 * reference.floor > 0


def test_missing_classes_add_to_the_distance_and_take_from_the_score(reference):
    some = torch.from_numpy(np.flatnonzero(reference.dataset.labels < 5))
    moments = reference.extractor.of_dataset(reference.dataset, some)
    assert frechet_distance(moments, reference.moments) > 5 * reference.floor
    assert moments.score() < 0.6 * reference.moments.score()


def test_images_are_scored_as_their_bytes(reference):
    images = data.to_float(torch.from_numpy(reference.dataset.images[:50]))
    exact = reference.extractor.add(Moments(), images)
    nearby = reference.extractor.add(Moments(), images + 0.3 / 127.5)
    outside = reference.extractor.add(Moments(), torch.where(images == 1, 3.0, images))
    assert torch.equal(exact.feature_sum, nearby.feature_sum) and torch.equal(exact.feature_sum, outside.feature_sum)


# --- evaluate ---

ROW = ["model", "sampler", "steps", "nfe", "guidance", "fd", "score", "images_per_second", "num", "seed"]


def test_evaluate_counts_network_calls(reference, runs):
    made, student = Guided(checkpoint.load(runs.teacher)), checkpoint.load(runs.stage2 / "steps-2")
    cases = [(made, 64, 1.0, 128), (made, 64, 0.0, 64), (made, 1, 4.0, 2), (student, 2, 1.0, 2), (student, 2, 0.0, 2)]
    for model, steps, w, calls in cases:
        sampling = Sampling(guidance=w, steps=steps, batch_size=5)
        row = evaluate(model, reference, sampling, name="m", num=12)
        assert list(asdict(row)) == ROW and row.nfe == calls
        assert (row.model, row.sampler, row.steps, row.guidance) == ("m", "ddim", steps, w)
        assert (row.num, row.seed) == (12, 0) and row.images_per_second > 0
        assert math.isfinite(row.fd) and 1 <= row.score <= 10


def test_evaluate_does_not_depend_on_the_batch_size_but_on_the_seed(reference, runs):
    model = with_guidance(checkpoint.load(runs.stage2 / "steps-1"))
    fds = [
        evaluate(model, reference, Sampling(guidance=1.0, seed=seed, batch_size=size), name="m", num=40).fd
        for seed, size in ((0, 40), (0, 7), (1, 40))
    ]
    assert fds[0] == pytest.approx(fds[1], rel=1e-3) and fds[0] != pytest.approx(fds[2], rel=1e-3)


def test_evaluate_prefers_the_data_themselves(reference, runs):
    """A model of noise is further away than one that returns the training images."""
    noise = randomize(checkpoint.load(runs.stage2 / "steps-1"))
    bad = evaluate(noise, reference, Sampling(guidance=0.0), name="m", num=100).fd
    real = reference.extractor.of_dataset(reference.dataset, torch.arange(100))
    assert bad > 2 * frechet_distance(real, reference.moments)


def test_evaluate_draws_the_labels_of_the_data(reference, runs, monkeypatch):
    seen = []
    model = checkpoint.load(runs.stage2 / "steps-1")
    real = model.affine
    monkeypatch.setattr(model, "affine", lambda z, angle, label, w: seen.append(label) or real(z, angle, label, w))
    evaluate(model, reference, Sampling(guidance=0.0), name="m", num=len(reference.dataset))
    assert (torch.cat(seen).numpy() == reference.dataset.labels).all()


def test_table_has_a_line_a_model_and_a_column_a_strength(reference):
    how = {"sampler": "ddim", "steps": 4, "images_per_second": 1.0, "num": 10, "seed": 0}
    row = Row(model="m", nfe=8.0, guidance=1.0, fd=1.25, score=9.5, **how)
    rows = [row, replace(row, guidance=0.0, fd=3.5, nfe=4.0), replace(row, model="n")]
    text = table(rows, reference.describe())
    assert "| m | 4 | 4 | 3.50 | 9.50 | 8 | 1.25 | 9.50 |" in text
    assert "| n | 4 |  |  |  | 8 | 1.25 | 9.50 |" in text
    assert "not FID" in text and f"{reference.floor:.2f}" in text


def test_reference_describes_itself(reference):
    found = reference.describe()
    assert found | {"half_against_half_fd": 0, "score": 0, "extractor_test_accuracy": 0} == {
        "data": "digits",
        "split": "train",
        "images": 1438,
        "extractor": "classifier1/digits",
        "extractor_test_accuracy": 0,
        "half_against_half_fd": 0,
        "score": 0,
    }
    assert replace(reference, floor=1.23456).describe()["half_against_half_fd"] == 1.2346


def test_halves_make_the_whole(extractor):
    dataset = data.load("digits")
    first, second = metrics.halves(extractor, dataset)
    whole, together = extractor.of_dataset(dataset), first + second
    assert first.count + second.count == together.count == len(dataset)
    assert metrics.frechet_distance(whole, together) < 1e-9
    assert together.score() == pytest.approx(whole.score(), rel=1e-9)
    assert 0.01 < metrics.frechet_distance(first, second) < 5


def test_labels_follow_the_data_even_where_it_is_sorted(extractor, monkeypatch):
    """A folder of images is sorted by class: a few samples must still be of all classes, in the data's shares."""
    dataset = data.load("digits")
    order = np.argsort(dataset.labels, kind="stable")
    dataset = replace(dataset, images=dataset.images[order], labels=dataset.labels[order])
    reference = Reference(dataset, extractor, extractor.of_dataset(dataset), 1.0)
    drawn = []

    def generate(model, labels, sampling):
        drawn.append(labels)
        yield torch.zeros(len(labels), 1, 8, 8)

    monkeypatch.setattr(evaluation, "generate", generate)
    model = Denoiser(DenoiserConfig(UNetConfig((8, 8), 1, 10, channels=8, channel_mult=(1,), middle_attention=False)))
    for num in (50, 3000):
        evaluate(model, reference, Sampling(guidance=0.0), name="", num=num)
        shares = np.bincount(drawn[-1].numpy(), minlength=10) / num
        assert np.abs(shares - np.bincount(dataset.labels) / len(dataset)).max() <= 1 / num + 1e-9
