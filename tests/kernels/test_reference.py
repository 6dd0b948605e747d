"""The PyTorch reference, which every fast backend is compared with, against formulas written out here on their own."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.autograd import gradcheck

import kernels
from kernels import backend, reference

ROOT = Path(__file__).resolve().parents[2]
MASK = 0xFFFFFFFF


def ids(*values):
    return torch.tensor(values, dtype=torch.int64)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


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


@pytest.fixture(scope="module")
def million():
    return kernels.randn((1000, 1000), seed=11, sample_ids=torch.arange(1000), step=4, device="cpu").double().numpy()


def test_normals_have_the_moments_of_a_standard_normal(million):
    count = million.size
    assert np.isfinite(million).all()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((million**power).mean() - moment) < 4.5 * math.sqrt(variance / count)
    assert 4.4 < np.abs(million).max() < 6.5


def test_normals_pass_the_kolmogorov_smirnov_test(million):
    assert stats.kstest(million.ravel(), "norm").pvalue > 1e-3
    assert stats.kstest(million[:, 0], "norm").pvalue > 1e-3  # over samples, at one pixel
    assert stats.kstest(million[0], "norm").pvalue > 1e-3  # over pixels, of one sample


def test_normals_are_uncorrelated_between_pixels_samples_steps_and_seeds(million):
    limit = 4.5 / math.sqrt(million.size)
    for lag in (1, 2, 3, 4, 8):
        assert abs((million[:, lag:] * million[:, :-lag]).mean()) < 1.01 * limit
        assert abs((million[lag:] * million[:-lag]).mean()) < 1.01 * limit
        assert abs(((million[:, lag:] ** 2 - 1) * (million[:, :-lag] ** 2 - 1)).mean()) < 2.02 * limit
    for change in ({"seed": 12, "step": 4}, {"seed": 11, "step": 5}):
        other = kernels.randn((1000, 1000), sample_ids=torch.arange(1000), device="cpu", **change)
        assert abs((million * other.double().numpy()).mean()) < limit


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


@pytest.mark.parametrize("bad", [ids(1, 2, 3), ids(1), ids(1, 2)[:, None], torch.tensor([1, 2], dtype=torch.int32)])
@pytest.mark.parametrize("name", ["randn", "rand"])
def test_ids_that_do_not_fit_the_shape_are_a_value_error(name, bad):
    with pytest.raises(ValueError, match=f"{name}: sample_ids"):
        getattr(kernels, name)((2, 4), seed=0, sample_ids=bad, step=0, device="cpu")


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


@pytest.mark.parametrize("dtypes", MIXES, ids=str)
@pytest.mark.parametrize("with_b", [False, True])
@pytest.mark.parametrize("with_z", [False, True])
def test_affine_update_is_the_sum_of_its_terms(dtypes, with_b, with_z):
    z, a, b = (draw(*SHAPE, seed=k, dtype=dtype) for k, dtype in enumerate(dtypes))
    coef_z, coef_a, coef_b = COEFFICIENTS
    expected = wide(coef_a) * as_float64(a)
    if with_z:
        expected += wide(coef_z) * as_float64(z)
    if with_b:
        expected += wide(coef_b) * as_float64(b)
    result = kernels.affine_update(
        z,
        a,
        b if with_b else None,
        coef_z=coef_z if with_z else None,
        coef_a=coef_a,
        coef_b=coef_b if with_b else None,
    )
    double = torch.float64 in (dtypes if with_b else dtypes[:2])
    assert result.dtype == (torch.float64 if double else torch.float32)
    tolerance = 1e-14 if double else 3e-6  # half-precision inputs are exact in float32: nothing else is rounded
    np.testing.assert_allclose(as_float64(result), expected, rtol=tolerance, atol=tolerance)


def test_float64_coefficients_lose_nothing_on_float64_images():
    z, a = draw(*SHAPE), draw(*SHAPE, seed=1)
    coef_z, coef_a = (torch.tensor([1 / 3, 2 / 7, math.pi], dtype=torch.float64) * k for k in (1, -1))
    result = kernels.affine_update(z, a, coef_z=coef_z, coef_a=coef_a)
    np.testing.assert_allclose(result.numpy(), wide(coef_z) * z.numpy() + wide(coef_a) * a.numpy(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_affine_update_rounds_once_to_out_dtype(dtype):
    z, a = draw(*SHAPE, dtype=torch.float32), draw(*SHAPE, seed=1, dtype=torch.float32)
    coef_z, coef_a, _ = COEFFICIENTS
    full = kernels.affine_update(z, a, coef_z=coef_z, coef_a=coef_a)
    result = kernels.affine_update(z, a, coef_z=coef_z, coef_a=coef_a, out_dtype=dtype)
    assert result.dtype == dtype
    assert torch.equal(result, full.to(dtype))


@settings(max_examples=40, deadline=None)
@given(limit=st.floats(0.01, 3), seed=st.integers(0, 1000))
def test_a_number_clips_the_sum(limit, seed):
    z, a = draw(*SHAPE, seed=seed), draw(*SHAPE, seed=seed + 1)
    coef_z, coef_a, _ = COEFFICIENTS
    total = wide(coef_z) * z.numpy() + wide(coef_a) * a.numpy()
    for clip in (limit, kernels.Clip(limit)):
        result = kernels.affine_update(z, a, coef_z=coef_z, coef_a=coef_a, clip=clip)
        np.testing.assert_allclose(result.numpy(), np.clip(total, -limit, limit), atol=1e-13)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_tensor_clips_each_sample_at_its_percentile_and_divides(wrapped):
    """Imagen's dynamic thresholding: a percentile under 1 clips at 1 and does not divide."""
    z, a = draw(*SHAPE), draw(*SHAPE, seed=1)
    coef_z, coef_a, _ = COEFFICIENTS
    percentile = torch.tensor([0.25, 1.5, 2.5])
    total = wide(coef_z) * z.numpy() + wide(coef_a) * a.numpy()
    limit = wide([1.0, 1.5, 2.5])
    assert (np.abs(total) > limit).any(axis=(1, 2, 3)).all()
    clip = kernels.Clip(percentile) if wrapped else percentile
    result = kernels.affine_update(z, a, coef_z=coef_z, coef_a=coef_a, clip=clip)
    np.testing.assert_allclose(result.numpy(), np.clip(total, -limit, limit) / limit, atol=1e-13)


@pytest.mark.parametrize("limit", [0.75, torch.tensor([0.25, 1.5, 2.5])], ids=["number", "tensor"])
def test_a_clip_with_coefficients_steps_on_from_the_clipped_image(limit):
    z, a, b = (draw(*SHAPE, seed=k) for k in range(3))
    coef_z, coef_a, coef_b = COEFFICIENTS
    step_z, step_x, noise = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([2.0, 3.0, -4.0]), torch.tensor([0.0, 1.0, 0.5])
    image = wide(coef_z) * z.numpy() + wide(coef_a) * a.numpy() + wide(coef_b) * b.numpy()
    if isinstance(limit, float):
        image = np.clip(image, -limit, limit)
    else:
        image = np.clip(image, -wide([1.0, 1.5, 2.5]), wide([1.0, 1.5, 2.5])) / wide([1.0, 1.5, 2.5])
    key = {"seed": 5, "sample_ids": ids(3, 1, 2), "step": 6}
    expected = wide(step_z) * z.numpy() + wide(step_x) * image
    expected += wide(noise) * as_float64(kernels.randn(SHAPE, device="cpu", **key))
    result = kernels.affine_update(
        z,
        a,
        b,
        coef_z=coef_z,
        coef_a=coef_a,
        coef_b=coef_b,
        clip=kernels.Clip(limit, step_z, step_x),
        coef_noise=noise,
        **key,
    )
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)


def test_noise_is_added_after_the_clip_and_comes_from_the_named_stream():
    z, a = draw(*SHAPE, dtype=torch.float32), draw(*SHAPE, seed=1, dtype=torch.float32)
    coef_z, coef_a, coef_noise = COEFFICIENTS
    key = {"seed": 2**40 + 1, "sample_ids": ids(2**35, 0, 8), "step": 3}
    quiet = kernels.affine_update(z, a, coef_z=coef_z, coef_a=coef_a, clip=0.5)
    noisy = kernels.affine_update(z, a, coef_z=coef_z, coef_a=coef_a, clip=0.5, coef_noise=coef_noise, **key)
    expected = quiet + coef_noise[:, None, None, None] * kernels.randn(SHAPE, device="cpu", **key)
    torch.testing.assert_close(noisy, expected, rtol=1e-6, atol=1e-6)


def test_an_empty_batch_gives_an_empty_batch():
    nothing, none = torch.empty(0, 2, 4, 4), torch.empty(0)
    result = kernels.affine_update(
        nothing,
        nothing,
        nothing,
        coef_z=none,
        coef_a=none,
        coef_b=none,
        clip=1.0,
        coef_noise=none,
        seed=0,
        sample_ids=ids(),
    )
    assert result.shape == (0, 2, 4, 4)
    loss = kernels.affine_regression_loss(
        nothing, nothing, nothing, nothing, coef_z=none, coef_a=none, coef_b=none, weight=none
    )
    assert loss.shape == (0,)
    assert kernels.sid_generator_loss(nothing, nothing, nothing, 1.2).shape == (0,)


def update_arguments():
    z = torch.zeros(SHAPE)
    one = torch.ones(3)
    return {"z": z, "a": z, "b": z, "coef_z": one, "coef_a": one, "coef_b": one} | {
        "coef_noise": one,
        "seed": 0,
        "sample_ids": ids(0, 1, 2),
        "step": 0,
    }


def test_the_arguments_that_the_next_test_breaks_are_good():
    assert kernels.affine_update(**update_arguments()).shape == SHAPE


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"a": torch.zeros(3, 2, 4, 1)}, "a has shape"),
        ({"b": torch.zeros(1, 2, 4, 5)}, "b has shape"),
        ({"coef_z": torch.ones(1)}, "coef_z"),
        ({"coef_a": torch.ones(2)}, "coef_a"),
        ({"coef_a": torch.ones(3, 1)}, "coef_a"),
        ({"coef_a": torch.tensor(1.0)}, "coef_a"),
        ({"coef_b": torch.ones(4)}, "coef_b"),
        ({"coef_noise": torch.ones(1)}, "coef_noise"),
        ({"coef_b": None}, "b and coef_b"),
        ({"b": None}, "b and coef_b"),
        ({"seed": None}, "seed"),
        ({"sample_ids": None}, "sample_ids"),
        ({"sample_ids": ids(0)}, "sample_ids"),
        ({"sample_ids": ids(0, 1, 2, 3)}, "sample_ids"),
        ({"sample_ids": torch.arange(3, dtype=torch.int32)}, "sample_ids"),
        ({"clip": torch.ones(1)}, "clip"),
        ({"clip": torch.ones(2)}, "clip"),
        ({"clip": kernels.Clip(1.0, torch.ones(1), torch.ones(3))}, "clip"),
        ({"clip": kernels.Clip(1.0, torch.ones(3), torch.ones(2))}, "clip"),
        ({"clip": kernels.Clip(1.0, torch.ones(3), None)}, "clip"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_affine_update_names_the_argument_that_does_not_fit(change, named):
    with pytest.raises(ValueError, match=f"affine_update.*{named}"):
        kernels.affine_update(**update_arguments() | change)


INTEGER = torch.zeros(SHAPE, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"z": INTEGER}, "z must be"),
        ({"a": INTEGER}, "a must be"),
        ({"coef_a": torch.ones(3, dtype=torch.int64)}, "coef_a must be"),
        ({"coef_noise": torch.ones(3, dtype=torch.bool)}, "coef_noise must be"),
    ],
    ids=str,
)
def test_affine_update_takes_floating_tensors_only(change, named):
    with pytest.raises(TypeError, match=f"affine_update: {named}"):
        kernels.affine_update(**update_arguments() | change)


@pytest.mark.parametrize("name", ["a", "b", "coef_z", "coef_noise", "sample_ids"])
def test_affine_update_wants_all_on_one_device(name):
    arguments = update_arguments()
    with pytest.raises(ValueError, match=f"affine_update: {name} is on meta"):
        kernels.affine_update(**arguments | {name: arguments[name].to("meta")})


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


def guided_velocity(v_cond, v_uncond):
    w = wide(GUIDANCE)
    return v_cond.numpy() if v_uncond is None else (1 + w) * v_cond.numpy() - w * v_uncond.numpy()


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("unguided", [False, True])
def test_guided_step_is_ddim_with_guidance(unguided, clip):
    z, v_cond, v_uncond = (draw(*SHAPE, seed=k) for k in range(3))
    v_uncond = None if unguided else v_uncond
    result = kernels.guided_step(z, v_cond, v_uncond, None if unguided else GUIDANCE, FROM, TO, clip=clip)
    expected = direct_step(z.numpy(), guided_velocity(v_cond, v_uncond), FROM, TO, clip)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-12)
    if clip is not None:
        assert not np.allclose(expected, direct_step(z.numpy(), guided_velocity(v_cond, v_uncond), FROM, TO))


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("unguided", [False, True])
def test_stochastic_step_goes_far_and_noises_back(unguided, clip):
    z, v_cond, v_uncond = (draw(*SHAPE, seed=k) for k in range(3))
    v_uncond = None if unguided else v_uncond
    key = {"seed": 1, "sample_ids": ids(5, 6, 7), "step": 2}
    result = kernels.stochastic_step(
        z, v_cond, v_uncond, None if unguided else GUIDANCE, FROM, FAR, TO, clip=clip, **key
    )
    far = direct_step(z.numpy(), guided_velocity(v_cond, v_uncond), FROM, FAR, clip)
    keep = np.cos(wide(TO)) / np.cos(wide(FAR))
    std = np.sqrt(np.sin(wide(TO)) ** 2 - (np.sin(wide(FAR)) * keep) ** 2)
    noise = as_float64(kernels.randn(SHAPE, device="cpu", **key))
    np.testing.assert_allclose(result.numpy(), keep * far + std * noise, atol=1e-12)


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


REGRESSIONS = [{}, {"b": None, "coef_b": None}, {"coef_z": None}]
REGRESSION_NAMES = ["all", "no b", "no z"]


@pytest.mark.parametrize("change", REGRESSIONS, ids=REGRESSION_NAMES)
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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"z": torch.zeros(3, 2, 4, 1)}, "z has shape"),
        ({"a": torch.zeros(1, 2, 4, 5)}, "a has shape"),
        ({"b": torch.zeros(3, 2, 4)}, "b has shape"),
        ({"coef_z": torch.ones(1)}, "coef_z"),
        ({"coef_a": torch.ones(2)}, "coef_a"),
        ({"coef_b": torch.ones(3, 1)}, "coef_b"),
        ({"weight": torch.ones(1)}, "weight"),
        ({"weight": torch.tensor(1.0)}, "weight"),
        ({"b": None}, "b and coef_b"),
        ({"coef_b": None}, "b and coef_b"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_affine_regression_loss_names_the_argument_that_does_not_fit(change, named):
    with pytest.raises(ValueError, match=f"affine_regression_loss.*{named}"):
        kernels.affine_regression_loss(**regression_arguments(**change))


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


@pytest.mark.parametrize("position", [1, 2])
def test_sid_loss_names_the_image_that_does_not_fit(position):
    inputs = [torch.zeros(SHAPE) for _ in range(3)]
    inputs[position] = torch.zeros(3, 2, 4, 1)
    with pytest.raises(ValueError, match=f"sid_generator_loss: {('', 'fake_x', 'generated_x')[position]} has shape"):
        kernels.sid_generator_loss(*inputs, 1.2)


# --- the network's operations ---


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
def test_group_norm_is_norm_then_modulation_then_silu(modulated, silu, channels_last):
    norm = nn.GroupNorm(4, 12, eps=1e-3).double()
    norm.weight.data, norm.bias.data = draw(12, seed=1), draw(12, seed=2)
    x, scale, shift = 2 + 3 * draw(3, 12, 5, 7), draw(3, 12, seed=4), draw(3, 12, seed=5)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    leaves = [t.detach().clone().requires_grad_() for t in (x, norm.weight, norm.bias, scale, shift)]
    modulation = {"scale": leaves[3], "shift": leaves[4]} if modulated else {}
    result = kernels.group_norm(leaves[0], 4, leaves[1], leaves[2], 1e-3, silu=silu, **modulation)
    expected = norm(x.contiguous())
    if modulated:
        expected = expected * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    if silu:
        expected = expected / (1 + torch.exp(-expected))
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11, check_stride=False)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert result.is_contiguous(memory_format=layout)


def test_group_norm_takes_its_statistics_over_each_group():
    x = 5 + 2 * draw(2, 6, 4, 4)
    result = kernels.group_norm(x, 3, torch.ones(6).double(), torch.zeros(6).double(), eps=0.0)
    groups = result.reshape(2, 3, -1)
    torch.testing.assert_close(groups.mean(-1), torch.zeros(2, 3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(groups.var(-1, unbiased=False), torch.ones(2, 3).double(), rtol=1e-12, atol=0)


def test_group_norm_passes_gradcheck():
    inputs = [t.requires_grad_() for t in (draw(2, 4, 2, 3), draw(4), draw(4, seed=1), draw(2, 4), draw(2, 4, seed=3))]
    assert gradcheck(
        lambda x, weight, bias, scale, shift: kernels.group_norm(
            x, 2, weight, bias, scale=scale, shift=shift, silu=True
        ),
        inputs,
    )


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_returns_the_dtype_of_a_half_precision_image(dtype, modulated):
    """Weights and modulation may be float32, as they are under autocast."""
    x = draw(2, 8, 4, 4).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias, scale, shift = draw(8).float(), draw(8, seed=1).float(), draw(2, 8).float(), draw(2, 8).float()
    modulation = {"scale": scale, "shift": shift} if modulated else {}
    result = kernels.group_norm(x, 4, weight, bias, silu=True, **modulation)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    exact = kernels.group_norm(
        x.double(), 4, weight.double(), bias.double(), silu=True, **{k: v.double() for k, v in modulation.items()}
    )
    torch.testing.assert_close(result.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("x", "groups", "modulation", "named"),
    [
        (torch.zeros(2, 6, 4), 3, {}, "B, C, H, W"),
        (torch.zeros(2, 6, 4, 4), 4, {}, "4 groups do not divide 6"),
        (torch.zeros(2, 6, 4, 4), 0, {}, "0 groups"),
        (torch.zeros(2, 6, 4, 4), 3, {"scale": torch.zeros(2, 6)}, "scale and shift"),
        (torch.zeros(2, 6, 4, 4), 3, {"shift": torch.zeros(2, 6)}, "scale and shift"),
    ],
)
def test_group_norm_names_what_is_wrong(x, groups, modulation, named):
    with pytest.raises(ValueError, match=f"group_norm: .*{named}"):
        kernels.group_norm(x, groups, torch.ones(6), torch.zeros(6), **modulation)


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


@pytest.mark.parametrize(("shape", "heads"), [((2, 5), 1), ((2, 5, 10), 1), ((2, 5, 12), 3), ((2, 5, 12), 0)])
def test_attention_names_what_is_wrong(shape, heads):
    with pytest.raises(ValueError, match="attention: qkv"):
        kernels.attention(torch.zeros(shape), heads)


# --- arguments that are nothing of the kind ---

GOOD = {
    "affine_update": update_arguments,
    "affine_regression_loss": lambda: {
        "prediction": torch.zeros(SHAPE),
        "z": torch.zeros(SHAPE),
        "a": torch.zeros(SHAPE),
        "b": None,
        "coef_z": torch.ones(3),
        "coef_a": torch.ones(3),
        "coef_b": None,
        "weight": torch.ones(3),
    },
    "sid_generator_loss": lambda: {
        "teacher_x": torch.zeros(SHAPE),
        "fake_x": torch.zeros(SHAPE),
        "generated_x": torch.zeros(SHAPE),
        "alpha": 1.0,
    },
    "add_noise": lambda: {
        "x": torch.zeros(SHAPE),
        "angle": torch.ones(3),
        "seed": 0,
        "sample_ids": ids(0, 1, 2),
        "step": 0,
    },
    "group_norm": lambda: {
        "x": torch.zeros(3, 4, 2, 2),
        "num_groups": 2,
        "weight": torch.ones(4),
        "bias": torch.ones(4),
        "eps": 1e-5,
    },
    "attention": lambda: {"qkv": torch.zeros(2, 5, 12), "num_heads": 2},
    "randn": lambda: {"shape": (3, 4), "seed": 0, "sample_ids": ids(0, 1, 2), "step": 0, "device": "cpu"},
}
NONSENSE = [
    *[
        (name, key, value)
        for name, keys in {
            "affine_update": ("z", "a", "coef_a"),
            "affine_regression_loss": ("prediction", "z", "a", "coef_a", "weight"),
            "sid_generator_loss": ("teacher_x", "fake_x", "generated_x"),
            "add_noise": ("x", "angle", "sample_ids"),
            "group_norm": ("x", "weight", "bias"),
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
    *[("attention", "num_heads", value) for value in (None, 2.0)],
    *[("randn", "shape", value) for value in (None, 3, (3, 1.5))],
]


@pytest.mark.parametrize(("name", "key", "value"), NONSENSE)
def test_nonsense_is_a_type_error_that_names_the_argument(name, key, value):
    with pytest.raises((TypeError, ValueError), match=f"{name}: {key.split('.')[0]}"):
        getattr(kernels, name)(**GOOD[name]() | {key: value})


@pytest.mark.parametrize("name", GOOD)
def test_what_nonsense_is_put_into_is_good(name):
    out = getattr(kernels, name)(**GOOD[name]())
    assert all(torch.isfinite(each).all() for each in (out if isinstance(out, tuple) else (out,)))


def test_other_refusals():
    with pytest.raises(ValueError, match="clip must be positive"):
        kernels.affine_update(**update_arguments() | {"clip": -1.0})
    with pytest.raises(ValueError, match="randn: shape"):
        kernels.randn((), seed=0, sample_ids=ids(), step=0, device="cpu")
    with pytest.raises(ValueError, match="randn: shape"):
        kernels.randn((1, -1), seed=0, sample_ids=ids(0), step=0, device="cpu")
    for name, key in (("affine_regression_loss", "prediction"), ("sid_generator_loss", "teacher_x")):
        empty = {
            k: torch.zeros(3, 0) if isinstance(v, torch.Tensor) and v.ndim > 1 else v for k, v in GOOD[name]().items()
        }
        with pytest.raises(ValueError, match=f"{name}: {key} has samples without elements"):
            getattr(kernels, name)(**empty)
    with pytest.raises(ValueError, match="sid_generator_loss: teacher_x must be"):
        kernels.sid_generator_loss(torch.zeros(3), torch.zeros(3), torch.zeros(3), 1.0)
    with pytest.raises(TypeError, match="attention: qkv must be float16"):
        kernels.attention(torch.zeros(2, 5, 12).to(torch.float8_e4m3fn), 2)


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


def test_the_reference_can_be_forced():
    with kernels.use("reference"):
        assert kernels.attention(QKV, 1).shape == (1, 2, 1)


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


def test_triton_is_named_only_in_the_kernels():
    for folder in ("fastdiff", "train"):
        for file in (ROOT / folder).rglob("*.py"):
            lines = file.read_text(encoding="utf-8").splitlines()
            assert not [line for line in lines if line.lstrip().startswith(("import triton", "from triton"))], file


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
