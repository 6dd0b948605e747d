"""The Triton backend: the operations of `reference` as kernels, each defined in the file of its name."""

from .affine_update import add_noise, affine_update
from .attention import attention
from .group_norm import group_norm, residual_norm
from .philox import rand, randn
from .regression_loss import affine_regression_loss
from .resample import downsample, upsample
from .residual import residual_sum
from .sid_loss import sid_generator_loss

__all__ = [
    "add_noise",
    "affine_regression_loss",
    "affine_update",
    "attention",
    "downsample",
    "group_norm",
    "rand",
    "randn",
    "residual_norm",
    "residual_sum",
    "sid_generator_loss",
    "upsample",
]
