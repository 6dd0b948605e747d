"""The Triton backend: the operations of `reference` as kernels, each defined in the file of its name."""

from .philox import rand, randn
from .regression import affine_regression_loss
from .sid_loss import sid_generator_loss
from .update import add_noise, affine_update

__all__ = ["add_noise", "affine_regression_loss", "affine_update", "rand", "randn", "sid_generator_loss"]
