"""Every differentiable operation as a function of one image x (2, 8, 4, 4), for what all of them must do alike."""

import torch

import kernels

SHAPE = (2, 8, 4, 4)


def operations(device: str) -> dict:
    """name -> the function; what else it takes is made on `device`."""
    image = torch.linspace(-1.5, 2.0, 256, device=device).cos().reshape(SHAPE)
    one, (weight, bias) = torch.ones(2, device=device), torch.ones(2, 8, device=device)
    key = {"seed": 1, "sample_ids": torch.arange(2, device=device), "step": 2}
    losses = {"coef_z": one, "coef_a": one, "coef_b": None, "weight": one}
    return {
        "affine_update": lambda x: kernels.affine_update(x, image, coef_z=one, coef_a=one, clip=0.5),
        "add_noise": lambda x: kernels.add_noise(x, one, **key)[0],
        "affine_regression_loss": lambda x: kernels.affine_regression_loss(x, image, image.cos(), None, **losses),
        "sid_generator_loss": lambda x: kernels.sid_generator_loss(x, image, image.cos(), 1.2),
        "group_norm": lambda x: kernels.group_norm(x, 2, weight, bias, silu=True),
        "attention": lambda x: kernels.attention(x.reshape(2, 4, 32)[..., :24], 1),
    }


NAMES = tuple(operations("meta"))
