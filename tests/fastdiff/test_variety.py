"""The variety of images, by which a collapse is told."""

import command_lines
import pytest
import torch

from fastdiff import data, metrics

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def noise_images(count, *shape, seed=0):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_variety_of_noise_is_its_variance():
    images, labels = noise_images(400, 3, 8, 8), torch.arange(400) % 4
    images[labels == 2] *= 0.5
    found = metrics.variety(images, labels)
    expected = [images[labels == k].double().flatten(1).numpy().var(0, ddof=1).mean() for k in range(4)]
    assert found.spread.tolist() == pytest.approx(expected, rel=1e-6) and found.near_duplicates == 0
    assert expected[2] == pytest.approx(expected[0] / 4, rel=0.1)


def test_variety_is_within_classes():
    """Ten images, one a class, are a collapse, however much they differ."""
    labels = torch.arange(200) % 10
    images = noise_images(10, 1, 8, 8)[labels] + 1e-3 * noise_images(200, 1, 8, 8, seed=1)
    assert metrics.variety(images, labels).spread.max() < 1e-6 < metrics.variety(images, labels * 0).spread.min()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 64, 64)], ids=str)
@pytest.mark.parametrize("count", [10, 48, 200])
def test_one_image_again_and_again_is_all_duplicates(shape, count):
    for seed in range(5):
        images = noise_images(1, *shape, seed=seed).expand(count, *shape)
        found = metrics.variety(images, torch.zeros(count, dtype=torch.int64))
        assert found.near_duplicates == 1 and found.spread.max() < 1e-12, seed


@pytest.mark.parametrize("repeated", [0, 2, 30, 60])
def test_near_duplicates_are_counted(repeated):
    images = noise_images(100, 3, 8, 8)
    images[:repeated] = images[0]
    images[1:repeated] += 0.01 * noise_images(max(0, repeated - 1), 3, 8, 8, seed=1)  # a fifteenth of their distance
    assert metrics.variety(images, torch.zeros(100, dtype=torch.int64)).near_duplicates == repeated / 100


def test_repeated_images_of_different_classes_are_no_duplicates():
    images = noise_images(50, 1, 8, 8).repeat(2, 1, 1, 1)
    assert metrics.variety(images, torch.arange(100) // 50).near_duplicates == 0
    assert metrics.variety(images, torch.zeros(100, dtype=torch.int64)).near_duplicates == 1


def test_real_digits_are_varied():
    digits = data.load("digits", "train")
    images, labels = data.to_float(torch.from_numpy(digits.images)), torch.from_numpy(digits.labels)
    found = metrics.variety(images, labels)
    assert found.near_duplicates < 0.01 and found.spread.min() > 0.05 and len(found.spread) == 10
    twice = metrics.variety(images[:500].repeat(2, 1, 1, 1), labels[:500].repeat(2))
    assert twice.near_duplicates == 1


def test_few_images_of_a_class_count_as_one_class():
    images = noise_images(20, 1, 8, 8)
    found = metrics.variety(images, torch.arange(20) % 10)
    assert found.spread.shape == (1,) and found.spread[0] == pytest.approx(
        float(images.double().var(0).mean()), rel=1e-6
    )
