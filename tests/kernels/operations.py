"""What the tests of the kernels share: draws, errors, and every differentiable operation as a function of one image."""

import math

import numpy as np
import torch
from scipy import stats

import kernels

SHAPE = (2, 8, 4, 4)


def operations(device: str) -> dict:
    """name -> the function of x, of SHAPE, for what all must do alike; what else it takes is made on `device`."""
    image = torch.linspace(-1.5, 2.0, 256, device=device).cos().reshape(SHAPE)
    one, (weight, bias, x_bias) = torch.ones(2, device=device), torch.ones(3, 8, device=device)
    key = {"seed": 1, "sample_ids": torch.arange(2, device=device), "step": 2}
    losses = {"coef_z": one, "coef_a": one, "coef_b": one, "weight": one}
    return {
        "affine_update": lambda x: kernels.affine_update(x, image, coef_z=one, coef_a=one, clip=0.5),
        "add_noise": lambda x: kernels.add_noise(x, one, **key)[0],
        "affine_regression_loss": lambda x: kernels.affine_regression_loss(
            x, image, image.cos(), image.sin(), **losses
        ),
        "sid_generator_loss": lambda x: kernels.sid_generator_loss(x, image, image.cos(), 1.2),
        "group_norm": lambda x: kernels.group_norm(x, 2, weight, bias, silu=True, x_bias=x_bias),
        "residual_norm": lambda x: kernels.residual_norm(
            x, image, None, 2, weight, bias, x_bias=x_bias, scale=0.5, silu=True
        )[0],
        "residual_sum": lambda x: kernels.residual_sum(x, image, x_bias=bias, scale=0.5),
        "downsample": lambda x: kernels.downsample(x),
        "upsample": lambda x: kernels.upsample(x),
        "attention": lambda x: kernels.attention(x.reshape(2, 4, 32)[..., :24], 1),
    }


NAMES = tuple(operations("meta"))


def draw(*shape, seed=0, dtype=torch.float32, device="cpu", channels_last=False):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = values.to(device, dtype)
    return values.contiguous(memory_format=torch.channels_last) if channels_last else values


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def error(value, exact):
    """‖value − exact‖/‖exact‖, in float64."""
    value, exact = value.detach().double().cpu(), exact.detach().double().cpu()
    return ((value - exact).norm() / (exact.norm() or 1)).item()


def worst(found, exact):
    """The largest of their errors, and NaN, which no limit allows, if any is that."""
    return float(np.max([error(one, other) for one, other in zip(found, exact, strict=True)]))


def assert_no_worse(found, usual, exact, factor=1.5):
    """Each within `factor` times the error that another computation makes."""
    for one, other, right in zip(found, usual, exact, strict=True):
        assert error(one, right) <= factor * error(other, right)


def assert_standard_normal(normals):
    """A million normals(seed, step) of (samples, pixels): in distribution, and from one to any other, independent."""
    million = normals(seed=11, step=4)
    assert million.size == 10**6
    assert np.isfinite(million).all()
    assert 4.4 < np.abs(million).max() < 6.5
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((million**power).mean() - moment) < 4.5 * math.sqrt(variance / million.size)
    for values in (million.ravel(), million[:, 0], million[0]):  # all, samples at one pixel, pixels of one sample
        assert stats.kstest(values, "norm").pvalue > 1e-3
    pairs = [(million, normals(**key)) for key in ({"seed": 12, "step": 4}, {"seed": 11, "step": 5})]
    for lag in (1, 2, 3, 4, 8):
        pairs += [(million[:, lag:], million[:, :-lag]), (million[lag:], million[:-lag])]
    for one, other in pairs:
        limit = 4.5 / math.sqrt(one.size)
        assert abs((one * other).mean()) < limit
        assert abs(((one**2 - 1) * (other**2 - 1)).mean()) < 2 * limit
