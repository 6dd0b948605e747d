"""Scores of generated images: Fréchet distance and Inception-style score on the features of a named extractor."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import trange

from fastdiff import data, distributed, files
from fastdiff.errors import UserError

FEATURE_WIDTH = 64
BATCH = 512
LEAST_IMAGES = 4  # two in each half, as a covariance needs


@dataclass
class Moments:
    """Running sums over features and class probabilities, in float64: all that the scores need of a set of images."""

    count: int = 0
    feature_sum: Tensor | float = 0.0
    outer_sum: Tensor | float = 0.0
    probability_sum: Tensor | float = 0.0
    neg_entropy_sum: Tensor | float = 0.0

    def add(self, features: Tensor, logits: Tensor) -> Moments:
        """features (N, D), logits (N, K) of N more images."""
        features, log_p = features.double(), logits.double().log_softmax(1)
        self.count += len(features)
        self.feature_sum = self.feature_sum + features.sum(0)
        self.outer_sum = self.outer_sum + features.T @ features
        self.probability_sum = self.probability_sum + log_p.exp().sum(0)
        self.neg_entropy_sum = self.neg_entropy_sum + (log_p.exp() * log_p).sum()
        return self

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets of images together."""
        return Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Moments)))

    @property
    def mean(self) -> Tensor:
        return self.feature_sum / self.count

    @property
    def covariance(self) -> Tensor:
        return (self.outer_sum - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)

    def score(self) -> float:
        """exp(mean KL(p(y|x) ‖ p(y))): the Inception score with this extractor's classes, from 1 to their number."""
        marginal = self.probability_sum / self.count
        entropy = -(marginal * marginal.clamp(min=1e-300).log()).sum()
        return math.exp(float(self.neg_entropy_sum / self.count + entropy))


def frechet_distance(first: Moments, second: Moments) -> float:
    """|μ1 − μ2|² + tr(Σ1 + Σ2 − 2·(Σ1·Σ2)^½). Raises UserError unless there are two images or more on both sides."""
    if min(first.count, second.count) < 2:
        raise UserError(f"a Fréchet distance needs two images or more on both sides, not {first.count}, {second.count}")
    return frechet_of_gaussians(first.mean, first.covariance, second.mean, second.covariance)


def frechet_of_gaussians(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """The same from means (D,) and covariances (D, D), float64."""
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # (Σ1·Σ2)^½ has the eigenvalues of the symmetric (Σ1^½·Σ2·Σ1^½)^½, which has no complex rounding residue.
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross))


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of results: what was drawn from which model, and its scores; in JSON an object with these keys."""

    model: str
    sampler: str
    steps: int
    nfe: float
    """Network calls an image."""
    guidance: float
    fd: float
    """Fréchet distance to the real images."""
    score: float
    images_per_second: float
    num: int
    """Images that were scored."""
    seed: int


def find(rows: Iterable[Row], model: str, steps: int, w: float) -> Row | None:
    """The row of a model at a number of steps and a strength."""
    return next((row for row in rows if (row.model, row.steps, row.guidance) == (model, steps, w)), None)


class Classifier(nn.Module):
    """A small convolutional classifier: images in [−1, 1] -> (features (B, 64), logits (B, K)).

    The features are the last convolution's, averaged over the image, as Inception's are for FID.
    """

    def __init__(self, image_channels: int, height: int, num_classes: int):
        super().__init__()
        halvings = max(1, round(math.log2(height / 4)))  # down to about 4×4 pixels
        widths = [image_channels, 32, *(min(128, 64 << i) for i in range(halvings)), FEATURE_WIDTH]
        strides = [1, *[2] * halvings, 1]
        layers: list[nn.Module] = []
        for before, after, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURE_WIDTH, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images.contiguous(memory_format=torch.channels_last)).mean((2, 3))
        return features, self.head(features)


@dataclass(frozen=True)
class Extractor:
    """A trained classifier with its name and its accuracy on the test split."""

    name: str
    network: Classifier
    accuracy: float

    @torch.no_grad()
    def add(self, moments: Moments, images: Tensor, *, what: str = "images") -> Moments:
        """Add images (N, C, H, W) in [−1, 1], rounded to the 8 bits that a picture file holds.

        what: what they are, for the UserError that is raised where some are not finite.
        """
        if bad := int((~data.are_finite(images)).sum()):
            raise UserError(
                f"{bad} of {len(images)} {what} are not finite, so there is no score of them: use another checkpoint, "
                "or --precision fp32"
            )
        device = next(self.network.parameters()).device
        for part in images.split(BATCH):
            features, logits = self.network(data.to_float(data.to_uint8(part)).to(device))
            moments.add(features.cpu(), logits.cpu())
        return moments

    def of_dataset(self, dataset: data.Dataset, indices: Tensor | None = None) -> Moments:
        """Moments of a data set's images, or of some of them."""
        moments = Moments()
        indices = torch.arange(len(dataset)) if indices is None else indices
        for part in indices.split(BATCH):
            self.add(moments, data.to_float(torch.from_numpy(dataset.images[part.numpy()])))
        return moments


def halves(extractor: Extractor, dataset: data.Dataset) -> tuple[Moments, Moments]:
    """Moments of one random half of a data set and of the other: their distance is what sampling error alone gives."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    return extractor.of_dataset(dataset, first), extractor.of_dataset(dataset, second)


def check_scorable(dataset: data.Dataset) -> None:
    """Raises UserError for a data set that nothing can be compared with: without classes, or with too few images."""
    if dataset.num_classes < 2:
        raise UserError(
            f"--data {dataset.name}: scores need a data set with labels, of two classes or more, to train the feature "
            "extractor on"
        )
    if len(dataset) < LEAST_IMAGES:
        raise UserError(
            f"--data {dataset.name}: scores need {LEAST_IMAGES} images or more, and its split {dataset.split!r} has "
            f"{len(dataset)}: give more images"
        )


def load_extractor(
    spec: str, *, device: str = "cpu", cache: Path | None = None, background: str = "white"
) -> Extractor:
    """The embedded extractor of a data set: a classifier trained once on its training split, then cached.

    Raises UserError as `check_scorable` does.
    """
    train = data.load(spec, "train", background=background)
    check_scorable(train)
    train, test = _train_and_test(spec, train, background)
    cache = cache or Path(os.environ.get("FASTDIFF_CACHE", "~/.cache/fastdiff")).expanduser() / "features"
    path = cache / f"classifier1-{train.name}-{train.fingerprint}.safetensors"
    network = Classifier(train.shape[0], train.shape[1], train.num_classes)
    accuracy = _read(path, network)
    if accuracy is None:
        accuracy = _train(network, train, test)
        _write(path, network, accuracy)
    network.eval().to(device, memory_format=torch.channels_last)  # as it was trained: others round otherwise
    return Extractor(f"classifier1/{train.name}", network, accuracy)


def _train_and_test(spec: str, train: data.Dataset, background: str) -> tuple[data.Dataset, data.Dataset]:
    """A data set's splits; a tenth of the training images is held out where it has no test split."""
    try:
        return train, data.load(spec, "test", background=background)
    except data.NoSplitError:
        period = min(10, len(train))
        held = torch.arange(len(train)).numpy() % period == period - 1
        return tuple(replace(train, images=train.images[part], labels=train.labels[part]) for part in (~held, held))


def _train(network: Classifier, train: data.Dataset, test: data.Dataset) -> float:
    """Train in place with a fixed seed; returns the accuracy on the test split."""
    updates = 1000 if len(train) < 10_000 else 2000
    batches = data.Batches(train, min(128, len(train)), seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in network.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=updates)
    network.train()
    what = f"feature extractor for {train.name}, once"
    for _ in trange(
        updates,
        desc=what,
        unit="update",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 20,
        disable=not distributed.is_first(),
    ):
        batch = next(batches)
        _, logits = network(data.to_float(batch.images))
        F.cross_entropy(logits, batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    network.eval()
    correct = 0
    with torch.no_grad():
        for part in torch.arange(len(test)).split(BATCH):
            _, logits = network(data.to_float(torch.from_numpy(test.images[part.numpy()])))
            correct += int((logits.argmax(1) == torch.from_numpy(test.labels[part.numpy()])).sum())
    return correct / len(test)


def _read(path: Path, network: Classifier) -> float | None:
    try:
        with safe_open(path, "pt") as file:
            network.load_state_dict({key: file.get_tensor(key) for key in network.state_dict()})
            return float(file.metadata()["accuracy"])
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError):
        return None  # not there, or damaged: train it again


def _write(path: Path, network: Classifier, accuracy: float) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = {key: value.contiguous() for key, value in network.state_dict().items()}
        with files.writing(path, shared=True) as place:
            save_file(weights, place, metadata={"accuracy": repr(accuracy)})
    except OSError:
        pass  # the cache only saves time


VARIETY_IMAGES = 2048  # looked at by `variety`, which compares pairs
FEW = 8  # images of a class, below which all classes count as one


@dataclass(frozen=True)
class Variety:
    """How much generated images differ; both numbers tell of a collapse that a Fréchet distance shows late."""

    spread: Tensor
    """Variance of a pixel within each class, averaged over the image, (K,)."""
    near_duplicates: float
    """Share of images with another one of the same class nearer than a tenth of the class's typical distance."""


def variety(images: Tensor, labels: Tensor) -> Variety:
    """Of images (N, C, H, W) with classes (N,) int64, N ≥ 2; of the first 2048 of them."""
    pixels, labels = images[:VARIETY_IMAGES].flatten(1).double(), labels[:VARIETY_IMAGES]
    labels = torch.unique(labels, return_inverse=True)[1]
    if labels.bincount().min() < FEW:
        labels = torch.zeros_like(labels)
    spread, repeated = [], 0
    for label in range(int(labels.max()) + 1):
        members = pixels[labels == label]
        spread.append(members.var(0).mean())
        exact = torch.cdist(members, members, compute_mode="donot_use_mm_for_euclid_dist")
        distance = exact.square() / members.shape[1]  # mean over pixels
        distance.fill_diagonal_(torch.inf)
        repeated += int((distance.min(1).values <= 2 * spread[-1] / 100).sum())  # pairs differ by 2·variance
    return Variety(torch.stack(spread), repeated / len(pixels))
