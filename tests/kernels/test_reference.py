"""The PyTorch reference, which every fast backend is compared with, against formulas written out here on their own."""

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import operations
import pytest
import torch
from scipy import stats
from torch import nn
from torch.autograd import gradcheck

import kernels
from kernels import backend, reference

ROOT = Path(__file__).resolve().parents[2]
MASK = 0xFFFFFFFF
draw = partial(operations.draw, dtype=torch.float64)


def ids(*values):
    return torch.tensor(values, dtype=torch.int64)


def wide(coefficient):
    return np.asarray(coefficient, dtype=np.float64)[:, None, None, None]


def as_float64(tensor):
    return tensor.double().numpy()


# --- noise ---


def philox_words(counter, key):
    """Philox 4×32-10 in Python integers (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3")."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second & MASK, (first >> 32) ^ c[3] ^ k[1], first & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


KNOWN_ANSWERS = [  # from Random123's kat_vectors
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def parse(words):
    return [int(word, 16) for word in words.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, answer):
    low, high = parse(key)
    words = reference.philox(tuple(torch.tensor([word]) for word in parse(counter)), low | high << 32)
    assert [word.item() for word in words] == parse(answer)
    assert philox_words(parse(counter), (low, high)) == parse(answer)


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 7, 2**64 - 1])
@pytest.mark.parametrize("sample", [0, 3, 2**40 + 5, 2**63 - 1])
@pytest.mark.parametrize("step", [0, 9, 2**31 + 1])
def test_the_stream_is_counted_by_block_step_and_sample(seed, sample, step):
    """Counter (block, step, low and high word of the sample id), key (low and high word of the seed)."""
    words = []
    for block in range(3):
        words += philox_words((block, step, sample & MASK, sample >> 32), (seed & MASK, seed >> 32))
    key = {"seed": seed, "sample_ids": ids(sample), "step": step, "device": "cpu"}
    uniforms = [word // 256 / 2**24 for word in words]
    np.testing.assert_array_equal(kernels.rand((1, 11), **key)[0].numpy(), np.float32(uniforms[:11]))
    positive = [(word // 256 + 0.5) / 2**24 for word in words]
    normals = []
    for first, second in zip(positive[::2], positive[1::2], strict=True):
        radius = math.sqrt(-2 * math.log(first))
        normals += [radius * math.cos(2 * math.pi * second), radius * math.sin(2 * math.pi * second)]
    np.testing.assert_allclose(kernels.randn((1, 11), **key)[0].numpy(), normals[:11], atol=2e-6)


def test_a_million_normals_are_standard_and_independent():
    def normals(**key):
        return as_float64(kernels.randn((1000, 1000), sample_ids=torch.arange(1000), device="cpu", **key))

    operations.assert_standard_normal(normals)


@pytest.mark.parametrize("name", ["randn", "rand"])
def test_a_row_depends_on_its_own_id_alone(name):
    generate = getattr(kernels, name)
    key = {"seed": 3, "step": 1, "device": "cpu"}
    whole = generate((6, 3, 5), sample_ids=ids(4, 9, 0, 2**33, 17, 5), **key)
    for order in ([5, 3, 1], [0], [2, 2, 4]):
        some = ids(4, 9, 0, 2**33, 17, 5)[order]
        assert torch.equal(generate((len(order), 3, 5), sample_ids=some, **key), whole[order])
    for elements in (1, 2, 3, 4, 5, 7, 14, 15):  # fewer pixels are the first ones
        part = generate((6, elements), sample_ids=ids(4, 9, 0, 2**33, 17, 5), **key)
        assert torch.equal(part, whole.flatten(1)[:, :elements])


@pytest.mark.parametrize("name", ["randn", "rand"])
@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"seed": 3 + 2**32},
        {"seed": 3 + 2**63},
        {"step": 1},
        {"step": 2**31},
        {"sample_ids": ids(8)},
        {"sample_ids": ids(7 + 2**32)},
        {"sample_ids": ids(7 + 2**62)},
    ],
    ids=str,
)
def test_seed_step_and_id_all_matter(name, change):
    base = {"seed": 3, "step": 0, "sample_ids": ids(7)}
    first, second = (getattr(kernels, name)((1, 64), device="cpu", **key) for key in (base, base | change))
    assert (first == second).float().mean() < 0.05


def test_noise_shapes_and_dtypes():
    for shape in ((2,), (2, 1), (2, 3), (2, 3, 5, 7), (0, 3, 2, 2)):
        for generate in (kernels.randn, kernels.rand):
            noise = generate(shape, seed=0, sample_ids=torch.arange(shape[0]), step=0, device="cpu")
            assert noise.shape == shape
            assert noise.dtype == torch.float32


def test_uniforms_fill_the_unit_interval():
    uniforms = kernels.rand((500, 1000), seed=5, sample_ids=torch.arange(500), step=2, device="cpu").double().numpy()
    assert 0 <= uniforms.min() < 1e-4
    assert 1 - 1e-4 < uniforms.max() < 1
    assert stats.kstest(uniforms.ravel(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(uniforms[:, :-1].ravel(), uniforms[:, 1:].ravel())[0, 1]) < 4.5 / math.sqrt(5e5)


# --- the update ---

SHAPE = (3, 2, 4, 5)
COEFFICIENTS = [torch.tensor([0.5, -1.5, 2.0]), torch.tensor([1.25, 0.75, -3.0]), torch.tensor([-2.0, 0.25, 1.0])]
MIXES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.float64, torch.float64, torch.float64),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float16, torch.float32),
    (torch.float32, torch.float64, torch.bfloat16),
]
PERCENTILE = torch.tensor([0.25, 1.5, 2.5])
STEP = {"coef_z": torch.tensor([0.1, 0.2, 0.3]), "coef_x": torch.tensor([2.0, 3.0, -4.0])}
CLIPS = {
    "no clip": None,
    "number": 0.75,
    "number in a Clip": kernels.Clip(0.75),
    "number, step": kernels.Clip(0.75, **STEP),
    "percentile": PERCENTILE,
    "percentile in a Clip": kernels.Clip(PERCENTILE),
    "percentile, step": kernels.Clip(PERCENTILE, **STEP),
}


def update_by_hand(z, a, b, *, coef_z, coef_a, coef_b, clip, coef_noise, **key):
    """The definition, in NumPy and float64."""
    terms = ((coef_z, z), (coef_a, a), (coef_b, b))
    out = sum(wide(coefficient) * as_float64(image) for coefficient, image in terms if coefficient is not None)
    if clip is not None:
        limit, step_z, step_x = clip if isinstance(clip, kernels.Clip) else kernels.Clip(clip)
        divides = isinstance(limit, torch.Tensor)  # Imagen's dynamic thresholding; under 1 it clips at 1
        bound = wide(limit.clamp(min=1)) if divides else limit
        assert (np.abs(out) > bound).any(axis=(1, 2, 3)).all()
        out = np.clip(out, -bound, bound) / (bound if divides else 1)
        if step_z is not None:
            out = wide(step_z) * as_float64(z) + wide(step_x) * out
    return out if coef_noise is None else out + wide(coef_noise) * as_float64(kernels.randn(SHAPE, device="cpu", **key))


@pytest.mark.parametrize("dtypes", MIXES, ids=str)
@pytest.mark.parametrize("with_b", [False, True])
@pytest.mark.parametrize("with_z", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_affine_update_sums_clips_steps_on_and_adds_noise(clip, noisy, with_z, with_b, dtypes):
    z, a, b = (draw(*SHAPE, seed=k, dtype=dtype) for k, dtype in enumerate(dtypes))
    coef_z, coef_a, coef_b = (coefficient.double() / 0.7 for coefficient in COEFFICIENTS)  # float32 would round them
    options = {
        "coef_z": coef_z if with_z else None,
        "coef_a": coef_a,
        "coef_b": coef_b if with_b else None,
        "clip": clip,
        "coef_noise": torch.tensor([0.0, 1.0, 0.5]) if noisy else None,
    } | {"seed": 2**40 + 1, "sample_ids": ids(2**35, 0, 8), "step": 3}
    b = b if with_b else None
    result = kernels.affine_update(z, a, b, **options)
    double = torch.float64 in (dtypes if with_b else dtypes[:2])
    assert result.dtype == (torch.float64 if double else torch.float32)
    tolerance = 1e-14 if double else 3e-6  # half-precision inputs are exact in float32: nothing else is rounded
    np.testing.assert_allclose(as_float64(result), update_by_hand(z, a, b, **options), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_affine_update_rounds_once_to_out_dtype(dtype):
    z, a = draw(*SHAPE, dtype=torch.float32), draw(*SHAPE, seed=1, dtype=torch.float32)
    coef_z, coef_a, _ = COEFFICIENTS
    full = kernels.affine_update(z, a, coef_z=coef_z, coef_a=coef_a)
    result = kernels.affine_update(z, a, coef_z=coef_z, coef_a=coef_a, out_dtype=dtype)
    assert result.dtype == dtype
    assert torch.equal(result, full.to(dtype))


def test_an_empty_batch_gives_an_empty_batch():
    image, none = torch.empty(0, 2, 4, 4), torch.empty(0)
    coefs = {"coef_z": none, "coef_a": none, "coef_b": none}
    noise = {"coef_noise": none, "seed": 0, "sample_ids": ids()}
    assert kernels.affine_update(image, image, image, **coefs, clip=1.0, **noise).shape == (0, 2, 4, 4)
    assert kernels.affine_regression_loss(image, image, image, image, **coefs, weight=none).shape == (0,)
    assert kernels.sid_generator_loss(image, image, image, 1.2).shape == (0,)


# --- the steps of the samplers ---

FROM, TO, FAR = (
    torch.tensor(values, dtype=torch.float64) for values in ([1.5, 1.0, 0.4], [1.2, 0.3, 0.2], [0.9, 0.1, 0])
)
GUIDANCE = torch.tensor([0.0, 1.0, 3.5])


def direct_step(z, velocity, start, end, limit=None):
    """[GD] eq. 4 in the image and the noise; a clipped image changes the noise with it."""
    cos, sin = np.cos(wide(start)), np.sin(wide(start))
    x = cos * z - sin * velocity
    if limit is not None:
        x = np.clip(x, -limit, limit)
    eps = (z - cos * x) / sin
    return np.cos(wide(end)) * x + np.sin(wide(end)) * eps


def step_arguments(unguided):
    """z, v_cond, v_uncond, guidance; and the guided velocity."""
    z, v_cond, v_uncond = (draw(*SHAPE, seed=k) for k in range(3))
    if unguided:
        return (z, v_cond, None, None), v_cond.numpy()
    w = wide(GUIDANCE)
    return (z, v_cond, v_uncond, GUIDANCE), (1 + w) * v_cond.numpy() - w * v_uncond.numpy()


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("unguided", [False, True])
def test_guided_step_is_ddim_with_guidance(unguided, clip):
    (z, *rest), velocity = step_arguments(unguided)
    expected = direct_step(z.numpy(), velocity, FROM, TO, clip)
    np.testing.assert_allclose(kernels.guided_step(z, *rest, FROM, TO, clip=clip).numpy(), expected, atol=1e-12)
    assert clip is None or not np.allclose(expected, direct_step(z.numpy(), velocity, FROM, TO))


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("unguided", [False, True])
def test_stochastic_step_goes_far_and_noises_back(unguided, clip):
    (z, *rest), velocity = step_arguments(unguided)
    key = {"seed": 1, "sample_ids": ids(5, 6, 7), "step": 2}
    result = kernels.stochastic_step(z, *rest, FROM, FAR, TO, clip=clip, **key)
    keep = np.cos(wide(TO)) / np.cos(wide(FAR))
    std = np.sqrt(np.sin(wide(TO)) ** 2 - (np.sin(wide(FAR)) * keep) ** 2)
    expected = keep * direct_step(z.numpy(), velocity, FROM, FAR, clip)
    expected += std * as_float64(kernels.randn(SHAPE, device="cpu", **key))
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-12)


def test_steps_return_float32_for_float32():
    z, v = draw(*SHAPE, dtype=torch.float32), draw(*SHAPE, seed=1, dtype=torch.bfloat16)
    result = kernels.guided_step(z, v, v, GUIDANCE, FROM.float(), TO.float())
    assert result.dtype == torch.float32
    np.testing.assert_allclose(as_float64(result), direct_step(as_float64(z), as_float64(v), FROM, TO), atol=1e-5)


def test_add_noise_is_the_definition_of_a_noisy_image():
    x = draw(*SHAPE)
    key = {"seed": 9, "sample_ids": ids(1, 2, 3), "step": 4}
    z, noise = kernels.add_noise(x, FROM, **key)
    assert torch.equal(noise, kernels.randn(SHAPE, device="cpu", **key))
    np.testing.assert_allclose(
        z.numpy(), np.cos(wide(FROM)) * x.numpy() + np.sin(wide(FROM)) * as_float64(noise), atol=1e-13
    )


# --- the losses ---


def regression_arguments(**change):
    images = {key: draw(*SHAPE, seed=k) for k, key in enumerate(("prediction", "z", "a", "b"))}
    coefficients = dict(zip(("coef_z", "coef_a", "coef_b"), (c.double() for c in COEFFICIENTS), strict=True))
    return images | coefficients | {"weight": torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)} | change


@pytest.mark.parametrize("change", [{}, {"b": None, "coef_b": None}, {"coef_z": None}], ids=["all", "no b", "no z"])
def test_affine_regression_loss_is_a_weighted_mean_square(change):
    arguments = regression_arguments(**change)
    target = np.zeros(SHAPE)
    for image in ("z", "a", "b"):
        if arguments[f"coef_{image}"] is not None:
            target += wide(arguments[f"coef_{image}"]) * arguments[image].numpy()
    error = target - arguments["prediction"].numpy()
    expected = arguments["weight"].numpy() * (error**2).mean(axis=(1, 2, 3))
    prediction = arguments["prediction"].requires_grad_()
    loss = kernels.affine_regression_loss(**arguments)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-12)
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(loss, prediction, upstream)
    by_hand = wide(upstream * arguments["weight"]) * -2 * error / error[0].size
    np.testing.assert_allclose(gradient.numpy(), by_hand, rtol=1e-12, atol=1e-14)


def test_affine_regression_loss_passes_gradcheck():
    arguments = regression_arguments()
    prediction = arguments.pop("prediction").requires_grad_()
    assert gradcheck(lambda p: kernels.affine_regression_loss(p, **arguments), (prediction,))


def test_the_target_of_a_regression_carries_no_gradient():
    arguments = regression_arguments()
    for image in ("prediction", "z", "a", "b"):
        arguments[image].requires_grad_()
    kernels.affine_regression_loss(**arguments).sum().backward()
    assert arguments["prediction"].grad.abs().sum() > 0
    assert [arguments[image].grad for image in ("z", "a", "b")] == [None] * 3


def test_half_precision_predictions_are_compared_in_float32():
    arguments = {k: v.to(torch.bfloat16) if v.ndim == 4 else v.float() for k, v in regression_arguments().items()}
    loss = kernels.affine_regression_loss(**arguments)
    assert loss.dtype == torch.float32
    exact = kernels.affine_regression_loss(**{key: value.double() for key, value in arguments.items()})
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    prediction = arguments["prediction"].requires_grad_()
    (gradient,) = torch.autograd.grad(kernels.affine_regression_loss(**arguments).sum(), prediction)
    assert gradient.dtype == torch.bfloat16


def sid_by_hand(teacher, fake, generated, alpha):
    """[SiD] eq. 23 with its three gradients, as method section 8 gives them; NumPy, float64."""
    d = teacher - fake
    residual = teacher - generated - alpha * d
    omega = np.maximum(np.abs(generated - teacher).mean(axis=(1, 2, 3)), 1e-5)
    loss = (d * residual).sum(axis=(1, 2, 3)) / omega
    scale = 1 / wide(omega)
    return loss, ((residual + (1 - alpha) * d) * scale, (alpha * d - residual) * scale, -d * scale)


@pytest.mark.parametrize("alpha", [1.0, 1.2, 0.5])
def test_sid_loss_and_its_three_gradients(alpha):
    inputs = [draw(*SHAPE, seed=k).requires_grad_() for k in range(3)]
    loss = kernels.sid_generator_loss(*inputs, alpha)
    value, gradients = sid_by_hand(*(t.detach().numpy() for t in inputs), alpha)
    np.testing.assert_allclose(loss.detach().numpy(), value, rtol=1e-11)
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for mine, theirs in zip(gradients, torch.autograd.grad(loss, inputs, upstream), strict=True):
        np.testing.assert_allclose(theirs.numpy(), wide(upstream) * mine, rtol=1e-11, atol=1e-12)


def test_sid_loss_passes_gradcheck_where_its_norm_is_held_fixed():
    """ω carries no gradient, so the numerical derivative is taken of loss·ω: a sum without it."""
    inputs = tuple(draw(*SHAPE, seed=k).requires_grad_() for k in range(3))
    omega = (inputs[2] - inputs[0]).detach().abs().flatten(1).mean(1)

    def without_norm(teacher, fake, generated):
        norm = (generated - teacher).detach().abs().flatten(1).mean(1)
        return kernels.sid_generator_loss(teacher, fake, generated, 1.2) * norm

    assert gradcheck(without_norm, inputs)
    normed = torch.autograd.grad(kernels.sid_generator_loss(*inputs, 1.2)[1], inputs)
    plain = torch.autograd.grad(without_norm(*inputs)[1], inputs)
    for one, other in zip(normed, plain, strict=True):
        torch.testing.assert_close(one * omega[1], other)


def test_sid_loss_of_a_perfect_generator_is_finite():
    """f_φ = x_g: ω is its floor 1e-5, and the loss −α·Σ d²/1e-5."""
    image, fake = draw(*SHAPE), draw(*SHAPE) + 1e-4
    expected = -1.2 * SHAPE[1] * SHAPE[2] * SHAPE[3] * 1e-8 / 1e-5
    loss = kernels.sid_generator_loss(image, fake, image.clone(), 1.2)
    torch.testing.assert_close(loss, torch.full((3,), expected, dtype=torch.float64), rtol=1e-8, atol=0)
    assert torch.equal(kernels.sid_generator_loss(image, image, image, 1.2), torch.zeros(3, dtype=torch.float64))


# --- the network's operations ---


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("mean", [2.0, -1e4])
def test_group_norm_is_norm_then_modulation_then_silu(mean, modulated, silu, channels_last):
    norm = nn.GroupNorm(4, 12, eps=1e-3).double()
    norm.weight.data, norm.bias.data = draw(12, seed=1), draw(12, seed=2)
    x = mean + 3 * draw(3, 12, 5, 7, channels_last=channels_last)
    scale, shift, x_bias = draw(3, 12, seed=4), draw(3, 12, seed=5), draw(12, seed=6)
    leaves = [t.detach().clone().requires_grad_() for t in (x, norm.weight, norm.bias, scale, shift)]
    modulation = {"scale": leaves[3], "shift": leaves[4], "x_bias": x_bias} if modulated else {}
    result = kernels.group_norm(leaves[0], 4, leaves[1], leaves[2], 1e-3, silu=silu, **modulation)
    expected = norm(x.contiguous() + (x_bias[:, None, None] if modulated else 0))
    if modulated:
        expected = expected * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    if silu:
        expected = expected / (1 + torch.exp(-expected))
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11, check_stride=False)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert result.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("mean", [5.0, -100.0])
def test_group_norm_takes_its_statistics_over_each_group(mean):
    x = mean + 2 * draw(2, 6, 4, 4)
    result = kernels.group_norm(x, 3, torch.ones(6).double(), torch.zeros(6).double(), eps=0.0)
    groups = result.reshape(2, 3, -1)
    torch.testing.assert_close(groups.mean(-1), torch.zeros(2, 3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(groups.var(-1, unbiased=False), torch.ones(2, 3).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("mean", [0.0, 50.0])
def test_group_norm_passes_gradcheck(mean):
    shapes = ((2, 4, 2, 3), (4,), (4,), (2, 4), (2, 4), (4,))
    inputs = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    inputs = [t.requires_grad_() for t in (mean + inputs[0], *inputs[1:])]

    def norm(x, weight, bias, scale, shift, x_bias):
        return kernels.group_norm(x, 2, weight, bias, scale=scale, shift=shift, silu=True, x_bias=x_bias)

    assert gradcheck(norm, inputs)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, -20.0])
def test_group_norm_returns_the_dtype_of_a_half_precision_image(dtype, modulated, mean):
    """Weights and modulation may be float32, as they are under autocast."""
    x = mean + draw(2, 8, 4, 4, dtype=dtype, channels_last=True)
    weight, bias, scale, shift = draw(8).float(), draw(8, seed=1).float(), draw(2, 8).float(), draw(2, 8).float()
    arguments = {"x": x, "weight": weight, "bias": bias} | ({"scale": scale, "shift": shift} if modulated else {})
    result = kernels.group_norm(num_groups=4, silu=True, **arguments)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    exact = kernels.group_norm(num_groups=4, silu=True, **{key: value.double() for key, value in arguments.items()})
    torch.testing.assert_close(result.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_residual_sum_is_a_sum_with_a_bias(dtype, scale):
    x, h = (draw(2, 6, 3, 4, seed=i, dtype=dtype) for i in range(2))
    bias = draw(6, seed=2)
    for given, added in (({"x_bias": bias}, bias[:, None, None]), ({}, 0)):
        result = kernels.residual_sum(x, h, scale=scale, **given)
        assert result.dtype == dtype
        torch.testing.assert_close(result, ((x.double() + h.double() + added) * scale).to(dtype))


def test_residual_sum_passes_gradcheck():
    x, h, x_bias = (draw(*shape).requires_grad_() for shape in ((2, 3, 2, 2), (2, 3, 2, 2), (3,)))
    assert gradcheck(lambda *a: kernels.residual_sum(*a[:2], x_bias=a[2], scale=0.7), (x, h, x_bias))


@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("with_h", [False, True])
def test_residual_norm_is_a_sum_a_concatenation_and_a_norm(with_skip, with_h):
    x, h, skip = (draw(2, c, 3, 4, seed=c, channels_last=True) for c in (6, 6, 10))
    h, skip, channels = h if with_h else None, skip if with_skip else None, 16 if with_skip else 6
    weight, bias, x_bias = draw(channels), draw(channels, seed=1), draw(6, seed=2)
    y, total, other = kernels.residual_norm(x, h, skip, 2, weight, bias, x_bias=x_bias, scale=0.5, silu=True)
    expected = ((x + h if with_h else x) + x_bias[:, None, None]) * 0.5
    torch.testing.assert_close(total, expected)
    assert other is (skip if with_skip else total)
    both = torch.cat([expected, skip], dim=1) if with_skip else expected
    torch.testing.assert_close(
        y, torch.nn.functional.silu(torch.nn.functional.group_norm(both, 2, weight, bias)), check_stride=False
    )
    plain = kernels.residual_norm(x, None, skip, 2, weight, bias)
    assert plain[1] is x


def test_residual_norm_passes_gradcheck():
    shapes = ((2, 3, 2, 2), (2, 3, 2, 2), (2, 5, 2, 2), (8,), (8,), (3,))
    leaves = tuple(draw(*shape, seed=k).requires_grad_() for k, shape in enumerate(shapes))
    assert gradcheck(
        lambda x, h, skip, w, b, x_bias: kernels.residual_norm(x, h, skip, 2, w, b, x_bias=x_bias, scale=0.7), leaves
    )


@pytest.mark.parametrize("channels_last", [False, True])
def test_resampling_takes_means_and_repeats(channels_last):
    x = draw(2, 3, 4, 6, channels_last=channels_last)
    half, twice = kernels.downsample(x), kernels.upsample(x)
    torch.testing.assert_close(half, x.unflatten(3, (3, 2)).unflatten(2, (2, 2)).mean((3, 5)), check_stride=False)
    assert torch.equal(twice, x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert half.is_contiguous(memory_format=layout) and twice.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_attention_is_a_softmax_written_out(heads):
    batch, tokens, width = 2, 7, 12 // heads
    qkv = draw(batch, tokens, 36)
    packed = qkv.numpy().reshape(batch, tokens, 3, heads, width)
    expected = np.empty((batch, tokens, heads, width))
    for sample in range(batch):
        for head in range(heads):
            q, k, v = (packed[sample, :, part, head] for part in range(3))
            scores = np.exp(q @ k.T / math.sqrt(width))
            expected[sample, :, head] = scores / scores.sum(axis=1, keepdims=True) @ v
    result = kernels.attention(qkv, heads)
    np.testing.assert_allclose(result.numpy(), expected.reshape(batch, tokens, 12), rtol=1e-11, atol=1e-12)


def test_attention_passes_gradcheck():
    assert gradcheck(lambda qkv: kernels.attention(qkv, 2), (draw(1, 3, 12).requires_grad_(),))


# --- what is refused ---

IMAGE, ONE, STREAM = torch.zeros(SHAPE), torch.ones(3), {"seed": 0, "sample_ids": ids(0, 1, 2), "step": 0}
COEFS, SID = {"coef_z": ONE, "coef_a": ONE, "coef_b": ONE}, ("teacher_x", "fake_x", "generated_x")
GOOD = {
    "affine_update": {"z": IMAGE, "a": IMAGE, "b": IMAGE, "coef_noise": ONE} | COEFS | STREAM,
    "affine_regression_loss": {"prediction": IMAGE, "z": IMAGE, "a": IMAGE, "b": IMAGE, "weight": ONE} | COEFS,
    "sid_generator_loss": dict.fromkeys(SID, IMAGE) | {"alpha": 1.0},
    "add_noise": {"x": IMAGE, "angle": ONE} | STREAM,
    "group_norm": {"x": IMAGE, "num_groups": 2, "weight": torch.ones(2), "bias": torch.ones(2), "eps": 1e-5},
    "residual_sum": {"x": IMAGE, "h": IMAGE, "x_bias": torch.ones(2), "scale": 0.5},
    "residual_norm": dict.fromkeys(("x", "h", "skip"), IMAGE)
    | {"num_groups": 2, "weight": torch.ones(4), "bias": torch.ones(4), "x_bias": torch.ones(2), "scale": 0.5},
    "downsample": {"x": torch.zeros(3, 2, 4, 6)},
    "upsample": {"x": IMAGE},
    "attention": {"qkv": torch.zeros(2, 5, 12), "num_heads": 2},
    "randn": {"shape": (3, 4), "device": "cpu"} | STREAM,
    "rand": {"shape": (3, 4), "device": "cpu"} | STREAM,
}
NARROW, SINGLE, EMPTY = torch.zeros(3, 2, 4, 1), torch.zeros(1, 2, 4, 5), torch.zeros(3, 0)
BAD_IDS = [ids(0), ids(0, 1, 2, 3), ids(0, 1, 2)[:, None], torch.arange(3, dtype=torch.int32)]


def elsewhere(name, *keys):
    return [(name, f"{key} is on meta", {key: GOOD[name][key].to("meta")}) for key in keys]


VALUE_ERRORS = [  # (operation, what its message says, the arguments that are wrong)
    ("affine_update", "a has shape", {"a": NARROW}),
    ("affine_update", "b has shape", {"b": SINGLE}),
    ("affine_update", "coef_z", {"coef_z": torch.ones(1)}),
    *[("affine_update", "coef_a", {"coef_a": c}) for c in (torch.ones(2), torch.ones(3, 1), torch.tensor(1.0))],
    ("affine_update", "coef_b", {"coef_b": torch.ones(4)}),
    ("affine_update", "coef_noise", {"coef_noise": torch.ones(1)}),
    *[("affine_update", "b and coef_b", {key: None}) for key in ("b", "coef_b")],
    *[("affine_update", key, {key: None}) for key in ("seed", "sample_ids")],
    *[("affine_update", "clip", {"clip": torch.ones(batch)}) for batch in (1, 2)],
    ("affine_update", "clip", {"clip": kernels.Clip(1.0, torch.ones(1), ONE)}),
    ("affine_update", "clip", {"clip": kernels.Clip(1.0, ONE, torch.ones(2))}),
    ("affine_update", "clip", {"clip": kernels.Clip(1.0, ONE, None)}),
    ("affine_update", "clip must be positive", {"clip": -1.0}),
    *elsewhere("affine_update", "a", "b", "coef_z", "coef_noise", "sample_ids"),
    ("affine_regression_loss", "z has shape", {"z": NARROW}),
    ("affine_regression_loss", "a has shape", {"a": SINGLE}),
    ("affine_regression_loss", "b has shape", {"b": torch.zeros(3, 2, 4)}),
    ("affine_regression_loss", "coef_z", {"coef_z": torch.ones(1)}),
    ("affine_regression_loss", "coef_a", {"coef_a": torch.ones(2)}),
    ("affine_regression_loss", "coef_b", {"coef_b": torch.ones(3, 1)}),
    *[("affine_regression_loss", "weight", {"weight": weight}) for weight in (torch.ones(1), torch.tensor(1.0))],
    *[("affine_regression_loss", "b and coef_b", {key: None}) for key in ("b", "coef_b")],
    ("affine_regression_loss", "prediction has samples without", dict.fromkeys(("prediction", "z", "a", "b"), EMPTY)),
    *[("sid_generator_loss", f"{key} has shape", {key: NARROW}) for key in SID[1:]],
    ("sid_generator_loss", "teacher_x must be", dict.fromkeys(SID, torch.zeros(3))),
    ("sid_generator_loss", "teacher_x has samples without elements", dict.fromkeys(SID, EMPTY)),
    ("group_norm", r"\(B, C, H, W\)", {"x": torch.zeros(3, 2, 4)}),
    *[("group_norm", f"{groups} groups do not divide 2", {"num_groups": groups}) for groups in (0, 4)],
    *[("group_norm", "scale and shift", {key: torch.zeros(3, 2)}) for key in ("scale", "shift")],
    ("group_norm", "x_bias must have shape", {"x_bias": ONE}),
    ("residual_sum", r"\(B, C, H, W\)", dict.fromkeys(("x", "h"), torch.zeros(3, 2, 4))),
    ("residual_sum", "h has shape", {"h": NARROW}),
    ("residual_sum", "x_bias must have shape", {"x_bias": ONE}),
    ("residual_norm", r"\(B, C, H, W\)", {"x": torch.zeros(3, 2, 4)}),
    ("residual_norm", "h must have shape", {"h": NARROW}),
    *[("residual_norm", "skip must be", {"skip": skip}) for skip in (NARROW, SINGLE, torch.zeros(3, 2, 4))],
    ("residual_norm", "3 groups do not divide 4", {"num_groups": 3}),
    *[("residual_norm", f"{key} must have shape", {key: torch.ones(5)}) for key in ("weight", "bias", "x_bias")],
    *elsewhere("residual_norm", "h", "skip", "weight", "x_bias"),
    *elsewhere("residual_sum", "h", "x_bias"),
    *[(name, r"\(B, C, H, W\)", {"x": torch.zeros(3, 2, 4)}) for name in ("downsample", "upsample")],
    ("downsample", "even", {"x": torch.zeros(3, 2, 4, 5)}),
    ("downsample", "even", {"x": torch.zeros(3, 2, 5, 4)}),
    *[("attention", "qkv", {"qkv": torch.zeros(shape)}) for shape in ((2, 5), (2, 5, 10))],
    *[("attention", "qkv", {"num_heads": heads}) for heads in (0, 3)],
    *[("randn", "shape", {"shape": shape}) for shape in ((), (1, -1))],
    *[(name, "sample_ids", {"sample_ids": bad}) for name in ("affine_update", "randn", "rand") for bad in BAD_IDS],
]


@pytest.mark.parametrize(
    ("name", "says", "wrong"), VALUE_ERRORS, ids=lambda value: ",".join(value) if isinstance(value, dict) else None
)
def test_arguments_that_do_not_fit_are_a_value_error_that_names_them(name, says, wrong):
    with pytest.raises(ValueError, match=f"^{name}: .*{says}"):
        getattr(kernels, name)(**GOOD[name] | wrong)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *[("affine_update", {key: IMAGE.long()}) for key in ("z", "a")],
        *[("affine_update", wrong) for wrong in ({"coef_a": ONE.long()}, {"coef_noise": ONE.bool()})],
        ("attention", {"qkv": torch.zeros(2, 5, 12).to(torch.float8_e4m3fn)}),
    ],
)
def test_other_dtypes_are_a_type_error(name, wrong):
    with pytest.raises(TypeError, match=f"{name}: {next(iter(wrong))} must be float16"):
        getattr(kernels, name)(**GOOD[name] | wrong)


NONSENSE = [
    *[
        (name, key, value)
        for name, keys in {
            "affine_update": ("z", "a", "coef_a"),
            "affine_regression_loss": ("prediction", "z", "a", "coef_a", "weight"),
            "sid_generator_loss": SID,
            "add_noise": ("x", "angle", "sample_ids"),
            "group_norm": ("x", "weight", "bias"),
            "residual_sum": ("x", "h"),
            "residual_norm": ("x", "weight", "bias"),
            "downsample": ("x",),
            "upsample": ("x",),
            "attention": ("qkv",),
            "randn": ("sample_ids",),
        }.items()
        for key in keys
        for value in (None, [1.0, 2.0], 1.5, torch.zeros(3, dtype=torch.complex64))
        if (name, key) != ("randn", "sample_ids") or not isinstance(value, torch.Tensor)
    ],
    *[(name, "step", value) for name in ("affine_update", "add_noise", "randn") for value in (None, 1.5, "1")],
    *[(name, "seed", value) for name in ("add_noise", "randn") for value in (None, 1.5, "1")],
    *[("affine_update", "clip", value) for value in ([1.0], "a", kernels.Clip(None))],
    *[("affine_update", "out_dtype", value) for value in (torch.int32, "float32")],
    *[("sid_generator_loss", "alpha", value) for value in (None, "1")],
    *[("group_norm", "num_groups", value) for value in (None, 2.0)],
    *[("group_norm", "eps", value) for value in (None, "a")],
    *[("residual_sum", "scale", value) for value in (None, "1")],
    *[("residual_norm", "scale", value) for value in (None, "1")],
    *[("residual_norm", key, value) for key in ("h", "skip", "x_bias") for value in (1.5, IMAGE.long())],
    *[("attention", "num_heads", value) for value in (None, 2.0)],
    *[("randn", "shape", value) for value in (None, 3, (3, 1.5))],
]


@pytest.mark.parametrize(("name", "key", "value"), NONSENSE)
def test_nonsense_is_a_type_error_that_names_the_argument(name, key, value):
    with pytest.raises((TypeError, ValueError), match=f"{name}: {key}"):
        getattr(kernels, name)(**GOOD[name] | {key: value})


@pytest.mark.parametrize("name", GOOD)
def test_the_arguments_that_these_tests_break_are_good(name):
    out = getattr(kernels, name)(**GOOD[name])
    assert all(torch.isfinite(each).all() for each in (out if isinstance(out, tuple) else (out,)))


def test_numpy_integers_are_integers():
    key = {"sample_ids": ids(0, 1), "device": "cpu"}
    plain = kernels.randn((2, 5), seed=3, step=4, **key)
    assert torch.equal(kernels.randn((2, 5), seed=np.int64(3), step=np.int32(4), **key), plain)


# --- the choice of a backend ---


class Marked:
    """A backend with one operation, to see whether it is asked."""

    @staticmethod
    def attention(qkv, num_heads):
        return "marked"


@pytest.fixture
def only_reference(monkeypatch):
    monkeypatch.setattr(backend, "BACKENDS", {"reference": reference})


@pytest.fixture
def marked_triton(monkeypatch):
    monkeypatch.setattr(backend, "BACKENDS", {"reference": reference, "triton": Marked})
    monkeypatch.setattr(backend, "INTERPRETED", True)  # so that CPU tensors are fit for it


QKV = torch.zeros(1, 2, 3)


def test_a_backend_that_is_not_here_is_a_runtime_error(only_reference, monkeypatch):
    with pytest.raises(RuntimeError, match="triton"), kernels.use("triton"):
        pass
    monkeypatch.setenv("FASTDIFF_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="FASTDIFF_KERNELS"):
        kernels.attention(QKV, 1)


def test_an_unknown_backend_is_a_value_error(monkeypatch):
    with pytest.raises(ValueError, match="cuda"), kernels.use("cuda"):
        pass
    monkeypatch.setenv("FASTDIFF_KERNELS", "cuda")
    with pytest.raises(ValueError, match="FASTDIFF_KERNELS"):
        kernels.attention(QKV, 1)


def test_cpu_tensors_run_the_reference_unless_forced(marked_triton, monkeypatch):
    assert isinstance(kernels.attention(QKV, 1), torch.Tensor)
    with kernels.use("triton"):
        assert kernels.attention(QKV, 1) == "marked"
        with kernels.use("reference"):
            assert isinstance(kernels.attention(QKV, 1), torch.Tensor)
        assert kernels.attention(QKV, 1) == "marked"
    monkeypatch.setenv("FASTDIFF_KERNELS", "triton")
    assert kernels.attention(QKV, 1) == "marked"
    with kernels.use("reference"):
        assert isinstance(kernels.attention(QKV, 1), torch.Tensor)


@pytest.mark.skipif(backend.INTERPRETED, reason="the interpreter takes CPU tensors")
def test_triton_on_cpu_tensors_says_what_is_missing():
    pytest.importorskip("triton")
    with kernels.use("triton"), pytest.raises(RuntimeError, match=r"attention: .* move them to a GPU"):
        kernels.attention(QKV, 1)


def test_the_choice_ends_with_its_block_even_after_an_error(marked_triton):
    with pytest.raises(KeyError), kernels.use("triton"):
        raise KeyError
    assert isinstance(kernels.attention(QKV, 1), torch.Tensor)


def test_the_reference_serves_where_a_backend_lacks_an_operation(marked_triton):
    with kernels.use("triton"):
        image = torch.ones(1, 1, 2, 2)
        assert torch.equal(kernels.affine_update(image, image, coef_z=None, coef_a=torch.ones(1)), image)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import kernels, fastdiff, train
import fastdiff.rotation, fastdiff.samplers, fastdiff.losses.regression, fastdiff.sample, train.loop
import torch
image = torch.ones(2, 1, 2, 2)
assert torch.equal(kernels.affine_update(image, image, coef_z=None, coef_a=torch.ones(2)), image)
try:
    with kernels.use("triton"):
        pass
except RuntimeError as error:
    print("refused:", error)
"""


def test_everything_imports_and_runs_without_triton():
    environment = {key: value for key, value in os.environ.items() if key != "FASTDIFF_KERNELS"}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("refused:")


def test_use_forces_without_a_block_too(marked_triton):
    plain = backend.implementation("attention", QKV)
    kernels.use("triton")
    try:
        assert backend.implementation("attention", QKV) is not plain
        with kernels.use("reference"):
            assert backend.implementation("attention", QKV) is plain
        assert backend.implementation("attention", QKV) is not plain
    finally:
        kernels.use(None)
    assert backend.implementation("attention", QKV) is plain


# --- torch.func.vmap ---


@pytest.mark.parametrize("name", operations.NAMES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_vmap_gives_what_each_call_gives(name, channels_last):
    function = operations.operations("cpu")[name]
    xs = torch.stack([draw(*operations.SHAPE, seed=i, dtype=torch.float32) for i in range(3)])
    if channels_last:
        xs = xs.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    mapped = torch.func.vmap(torch.func.grad(lambda x: function(x).square().sum()))(xs)
    each = torch.stack([torch.func.grad(lambda x: function(x).square().sum())(x) for x in xs])
    torch.testing.assert_close(mapped, each, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.func.vmap(function)(xs), torch.stack([function(x) for x in xs]))


@pytest.mark.parametrize("name", operations.NAMES)
def test_vmap_of_triton_is_refused(name, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(backend, "INTERPRETED", True)
    with kernels.use("triton"), pytest.raises(kernels.BackendError, match="vmap maps only the reference"):
        torch.func.vmap(operations.operations("cpu")[name])(torch.zeros(3, *operations.SHAPE))
