"""Attention and its gradient against the reference, the bytes that it moves, and what it refuses."""

import json
import math
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from addresses import assert_last_program_ends_with_its_tensors, launches, touched
from helpers import DTYPES, FEW, HALVES, doubled
from hypothesis import given
from hypothesis import strategies as st
from operations import assert_no_worse, draw, error, worst
from torch.library import opcheck
from traffic import traffic_of

import kernels
from kernels import reference

# `kernels.attention` is the public function; the module behind it goes by its full name.
module = import_module("kernels.fused.attention")
WIDTHS = st.sampled_from([16, 24, 32, 40, 48, 64, 80, 96, 128])


def case(batch, tokens, heads, width, dtype, device, *, scale=1.0, seed=0):
    qkv = draw(batch, tokens, 3 * heads * width, seed=seed, device=device)
    qkv[..., : 2 * heads * width] *= scale  # logits grow by its square
    return qkv.to(dtype).requires_grad_(), draw(batch, tokens, heads * width, seed=seed + 1, dtype=dtype, device=device)


def both(function, qkv, heads, direction):
    out = function(qkv, heads)
    return out, torch.autograd.grad(out, qkv, direction)[0]


def exact(qkv, heads, direction):
    return both(reference.attention, *doubled(qkv), heads, direction.double().cpu())


def eager(qkv, heads):
    """softmax(q·kᵀ/√d)·v, every step in the dtype of qkv."""
    batch, tokens, packed = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(batch, tokens, packed // 3)


def assert_right(qkv, heads, direction, *, in_float32=1e-5):
    """Values and gradients: float32 to `in_float32`, half precision to 1.5 times the error of eager PyTorch."""
    ours, right = both(kernels.attention, qkv, heads, direction), exact(qkv, heads, direction)
    assert [(each.dtype, each.shape) for each in ours] == [(qkv.dtype, each.shape) for each in right]
    if qkv.dtype == torch.float32:
        assert worst(ours, right) <= in_float32
    else:
        assert_no_worse(ours, both(eager, qkv, heads, direction), right)


@FEW
@given(
    batch=st.integers(1, 2),
    tokens=st.one_of(st.integers(1, 140), st.sampled_from([64, 128])),
    heads=st.integers(1, 3),
    width=WIDTHS,
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.0, 1.0, 5.0]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients(device, batch, tokens, heads, width, dtype, scale, seed):
    qkv, direction = case(batch, tokens, heads, width, dtype, device, scale=scale, seed=seed)
    assert_right(qkv, heads, direction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "width"),
    [(64, 2, 64), (49, 2, 24), (100, 2, 64), (256, 1, 32), (64, 1, 256), (100, 1, 200), (1, 1, 16)],
)
def test_chosen_sizes(device, dtype, tokens, heads, width):
    qkv, direction = case(2, tokens, heads, width, dtype, device)
    assert_right(qkv, heads, direction)


def test_1024_tokens(device):
    """As often as they are read: k and v 8 times forward and 16 backward, q and dO 16 times."""
    qkv, direction = case(1, 1024, 1, 64, torch.bfloat16, device)
    assert_right(qkv, 1, direction)
    assert module.tiles("forward", torch.bfloat16, 1024, 64)[:2] == (128, 64)
    assert module.tiles("backward_q", torch.bfloat16, 1024, 64)[:2] == (64, 64)
    assert module.tiles("backward_kv", torch.bfloat16, 1024, 64)[:2] == (64, 64)


def rounding_of_large_scores(product, width):
    """The relative error of a softmax in float32 whose scores are each a sum of `width` products of about `product`.

    A sum near s is rounded to a multiple of ulp(s) = 2^(⌊log₂ s⌋ − 23), and is off by ulp(s)/√12 in the root mean
    square. A GPU adds the products one after another, so that each partial sum k·product is rounded: for 64 products of
    25 far more than the score is itself, once log₂e/√width has made an exponent of 2 of it. Subtracting the largest
    score is exact, since all are near it; so an error of the exponent is one of P, times ln 2. Backward the saved
    log-sum-exp, which is as large, adds its rounding. exp2 (2 ulp, 2e-7) counts for nothing here.
    """

    def variance(s):
        return 4.0 ** (math.floor(math.log2(s)) - 23) / 12

    scale = math.log2(math.e) / math.sqrt(width)
    sums = scale**2 * sum(variance(k * product) for k in range(1, width + 1))
    return math.log(2) * math.sqrt(sums + 2 * variance(scale * width * product))


def carried(error_of_p, qkv, direction):
    """What independent errors of this relative size in every element of P do to the output and the gradient.

    The gradient of P's logits sums to 0 in each row; its errors do not. So in q's gradient they are multiplied with all
    of k, of which the gradient itself has only the differences.
    """
    (q, k, v), dy = qkv.detach().double().cpu().chunk(3, dim=-1), direction.double().cpu()
    scale = q.shape[-1] ** -0.5
    p = (scale * q @ k.mT).softmax(-1)
    wrong = p * (1 + error_of_p * draw(*p.shape, seed=7, dtype=torch.float64))

    def results(out, p):
        logits = scale * p * (dy @ v.mT - (dy * out).sum(-1, keepdim=True))
        return out, torch.cat([logits @ k, logits.mT @ q, p.mT @ dy], dim=-1)

    return worst(results(wrong @ v / wrong.sum(-1, keepdim=True), wrong), results(p @ v, p))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [33, 64, 100])
@pytest.mark.parametrize("sign", [-1, 1])
def test_logits_past_the_range_of_exp(device, dtype, tokens, sign):
    """q·k/√d is about ±200 everywhere, and missing keys, whose score is 0, must not outweigh those that are there."""
    qkv, direction = case(1, tokens, 1, 64, torch.float32, device)
    large = qkv.detach().clone()
    large[..., :128] = 5 + 0.01 * large[..., :128]
    large[..., 64:128] *= sign
    # The mean square is one of few scores that resemble each other.
    allowed = 1.5 * carried(rounding_of_large_scores(25, 64), large, direction)
    assert_right(large.to(dtype).requires_grad_(), 1, direction.to(dtype), in_float32=allowed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_give_equal_weights(device, dtype):
    qkv = draw(2, 1, 3 * 32, dtype=dtype, device=device).expand(2, 70, 96)
    out = kernels.attention(qkv, 1)
    assert error(out, qkv[..., 64:]) < 1e-6  # of 70 equal values the mean rounds back to them


def test_qkv_that_is_not_contiguous(device):
    wide = draw(40, 2, 200, device=device).requires_grad_()
    qkv = wide.transpose(0, 1)[..., 4:196]
    assert not qkv.is_contiguous()
    direction = draw(2, 40, 64, seed=1, device=device)
    gradients = (torch.autograd.grad(f(qkv, 2), wide, direction)[0] for f in (kernels.attention, reference.attention))
    assert error(*gradients) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [49, 64, 150])
def test_the_saved_logarithm(device, dtype, tokens):
    qkv, _ = case(2, tokens, 2, 32, dtype, device, scale=3.0)
    _, saved = module.attention_forward(qkv.detach(), 2)
    q, k, _ = qkv.detach().double().view(2, tokens, 3, 2, 32).permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(-1, -2) / math.sqrt(32)).logsumexp(-1) / math.log(2)
    assert saved.shape == (2, 2, tokens)
    assert saved.dtype == torch.float32
    assert error(saved, expected) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [64, 70])
def test_the_same_bits_every_time(device, dtype, tokens):
    qkv, direction = case(1, tokens, 2, 48, dtype, device)
    assert all(map(torch.equal, *(both(kernels.attention, qkv, 2, direction) for _ in range(2))))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(64, 64), (50, 24), (256, 64), (100, 48), (100, 256)])
def test_bytes(device, dtype, tokens, width):
    """q, the output and their gradients once; what the other side of the scores needs once per block."""
    heads = 1 if tokens == 256 else 2
    qkv, direction = case(1, tokens, heads, width, dtype, device)
    forward, backward = traffic_of(lambda: kernels.attention(qkv, heads), qkv)
    part, row = direction.numel() * direction.element_size(), 4 * heads * tokens

    def blocks(kernel, side):
        return -(-tokens // getattr(module.tiles(kernel, dtype, tokens, width), side))

    assert +forward.read == {"qkv": part * (1 + 2 * blocks("forward", "rows"))}
    assert +forward.written == {"out": part, "lse": row}
    if module.one_block(dtype, tokens, width):
        assert +backward.read == {"qkv": 3 * part, "grad": part, "lse": row}
        assert +backward.written == {"grad_qkv": 3 * part}
    else:
        q, kv = blocks("backward_q", "rows"), blocks("backward_kv", "keys")
        reads = {"qkv": (1 + 2 * q) + (2 + kv), "grad": 1 + kv, "out": 1}
        assert +backward.read == {name: n * part for name, n in reads.items()} | {
            "lse": row * (1 + kv),
            "delta": row * kv,
        }
        assert +backward.written == {"grad_qkv": 3 * part, "delta": row}


def test_half_precision_at_64_tokens_reads_each_tensor_once():
    assert all(module.one_block(dtype, 64, width) for dtype in HALVES for width in (16, 32, 64, 128))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "tokens"), [(540_000, 64), (34_000, 1024)])
def test_offsets_have_64_bits(dtype, batch, tokens):
    def attend():
        qkv = torch.empty(batch, tokens, 3 * 64, dtype=dtype, device="meta", requires_grad=True)
        out = kernels.attention(qkv, 1)
        torch.autograd.grad(out, qkv, out.detach())

    recorded = launches(attend)
    assert len(recorded) == (2 if module.one_block(dtype, tokens, 64) else 3)
    for one in recorded:
        if one.kernel.__name__ == "_backward_q_kernel":  # leaves the last row's dK and dV to the other kernel
            last = touched(one, one.grid[0] - 1)["grad_qkv"].max()
            assert last == one.arguments["grad_qkv"].numel() * dtype.itemsize - (2 * 64 + 1) * dtype.itemsize
        else:
            assert_last_program_ends_with_its_tensors(one)


def test_empty_and_float64_and_very_wide(device):
    assert kernels.attention(torch.empty(0, 5, 48, device=device), 2).shape == (0, 5, 16)
    assert kernels.attention(torch.empty(2, 0, 48, device=device), 2).shape == (2, 0, 16)
    for shape, dtype in (((1, 5, 48), torch.float64), ((1, 5, 3 * 320), torch.float32)):
        qkv = draw(*shape, dtype=dtype, device=device)
        assert torch.equal(kernels.attention(qkv, 1), reference.attention(qkv, 1))


@pytest.mark.parametrize("tokens", [40, 70])
def test_operators_keep_their_promises(device, tokens):
    qkv, direction = case(2, tokens, 2, 24, torch.bfloat16, device)
    qkv = qkv.detach()
    opcheck(torch.ops.fastdiff.attention.default, (qkv, 2))
    opcheck(torch.ops.fastdiff.attention_backward.default, (direction, qkv, *module.attention_forward(qkv, 2), 2))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(device, dynamic):
    def loss(qkv):
        return kernels.attention(qkv * 1, 2).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for tokens in (64, 70):
        qkv, _ = case(1, tokens, 2, 32, torch.float32, device)
        assert error(*(torch.autograd.grad(f(qkv), qkv)[0] for f in (compiled, loss))) < 1e-6


def test_the_table_of_measurements(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    assert module.read_table(path) == {}
    row = {"gpu": "A", "dtype": "bfloat16", "head_width": 64, "tokens": 1024, "inference": "triton", "training": "sdpa"}
    path.write_text(json.dumps([row, row | {"tokens": 64, "inference": "sdpa", "training": "triton"}]))
    monkeypatch.setattr(module, "TABLE", module.read_table(path))
    for tokens, in_training, expected in [(1024, 0, "triton"), (1024, 1, "sdpa"), (64, 0, "sdpa"), (64, 1, "triton")]:
        assert module.faster("A", torch.bfloat16, 64, tokens, bool(in_training)) == expected
    path.write_text(json.dumps([row | {"training": "flash"}]))
    with pytest.raises(ValueError, match="training is 'flash'"):
        module.read_table(path)
    path.write_text(json.dumps([{key: value for key, value in row.items() if key != "inference"}]))
    with pytest.raises(ValueError, match="inference is None"):
        module.read_table(path)


def test_what_is_taken_for_faster_where_nothing_was_measured():
    def choices(dtype, width, training):
        return [module.faster("B", dtype, width, tokens, training) for tokens in (64, 256, 257, 4096)]

    assert choices(torch.bfloat16, 64, False) == ["triton", "triton", "sdpa", "sdpa"]
    assert choices(torch.bfloat16, 64, True) == choices(torch.float16, 128, True) == ["triton"] * 4
    assert choices(torch.float32, 64, True) == choices(torch.bfloat16, 256, True) == choices(torch.bfloat16, 64, False)
    assert choices(torch.bfloat16, 512, True) == ["sdpa"] * 4


@pytest.mark.parametrize("training", [False, True])
def test_a_gradient_that_is_wanted_counts(monkeypatch, training):
    """On a tensor that says that it is on a GPU."""
    monkeypatch.setattr(module, "TABLE", {})
    sizes = SimpleNamespace(shape=(1, 1024, 192), is_cuda=True, dtype=torch.bfloat16, requires_grad=True)
    with torch.set_grad_enabled(training):
        assert module.prefers_sdpa(sizes, 1) == (not training)
    sizes.requires_grad = False
    assert module.prefers_sdpa(sizes, 1)


def test_only_a_gpu_prefers_anything():
    assert not module.prefers_sdpa(torch.empty(1, 1024, 192, device="meta"), 1)
