"""GroupNorm with scale, shift and SiLU: values, gradients, what moves, and which path runs."""

import sys

import pytest
import torch
import torch.nn.functional as F
from addresses import assert_last_program_ends_with_its_tensors, launches
from helpers import DTYPES, FEW, HALVES, SEEDS, doubled, on_reference, with_reference
from hypothesis import given
from hypothesis import strategies as st
from operations import assert_no_worse, draw, error, meta, worst
from torch.library import opcheck
from traffic import traffic, traffic_of

import kernels

MODULE = sys.modules["kernels.fused.group_norm"]  # as an attribute of `kernels` the name is the function's
ONE_PASS = {"forward": ["one_pass_kernel"], "backward": ["one_pass_backward_kernel"]}
SPLIT = {
    "forward": ["stats_kernel", "combine_stats_kernel", "apply_kernel"],
    "backward": ["sums_kernel", "combine_sums_kernel", "input_gradient_kernel"],
}
PARAMETERS = ["_parameter_gradients_kernel"]
PATHS = {  # (shape, groups): of 8 channels each, which fit in registers together, and of 6, which never do
    "one pass": ((2, 32, 16, 16), 4, ONE_PASS),
    "padded": ((2, 48, 8, 8), 2, ONE_PASS),
    "split": ((2, 12, 24, 24), 2, SPLIT),
}
each_path = pytest.mark.parametrize(("shape", "groups", "path"), PATHS.values(), ids=PATHS)


@pytest.fixture(scope="module", autouse=True)
def small_device():
    """Two programs are two waves here, so that small tensors take the path that large ones do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "multiprocessors", lambda device: 1)
        yield


def inputs(
    shape,
    layout="channels_last",
    dtype=torch.float32,
    parameters=None,
    modulated=True,
    device="cpu",
    seed=0,
    mean=0.0,
):
    """Leaves x, weight, bias and, for scale and shift, one tensor of both; None where there is no modulation.

    mean: of x, whose deviation is 1.
    """
    batch, channels, height, width = shape
    if layout == "sliced":
        x = draw(batch, channels, height, 2 * width, seed=seed, dtype=dtype, device=device)[..., ::2]
    else:
        x = draw(*shape, seed=seed, dtype=dtype, device=device, channels_last=layout == "channels_last")
    x = x + mean
    parameters = parameters or dtype
    weight, bias = (draw(channels, seed=seed + 1 + i, dtype=parameters, device=device) for i in range(2))
    both = draw(batch, 2 * channels, seed=seed + 3, dtype=parameters, device=device) if modulated else None
    return [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, both)]


def normalized(x, weight, bias, both, groups, silu=True, eps=1e-5):
    scale, shift = (None, None) if both is None else both.chunk(2, dim=1)
    return kernels.group_norm(x, groups, weight, bias, eps, scale=scale, shift=shift, silu=silu)


def in_pytorch(x, weight, bias, both, groups, silu):
    """What PyTorch alone does, in the dtype of its inputs."""
    y = F.group_norm(x, groups, weight, bias)
    if both is not None:
        scale, shift = both[:, :, None, None].chunk(2, dim=1)
        y = y * (1 + scale) + shift
    return F.silu(y) if silu else y


def gradients(y, leaves):
    direction = draw(*y.shape, seed=9, dtype=torch.bfloat16, device=y.device)  # the same numbers in each dtype
    return torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], direction.to(y.dtype))


def results(function, leaves, *options):
    """(y, *gradients)"""
    y = function(*leaves, *options)
    return y, *gradients(y, leaves)


def on_float64(leaves, groups, silu=True):
    """(y, *gradients), exact as far as the tests can tell."""
    return on_reference(results, normalized, doubled(*leaves), groups, silu)


# --- values and gradients ---


@FEW
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 3),
    size=st.sampled_from([1, 2, 3, 5, 8, 16, 24]),
    height=st.integers(2, 12),
    width=st.integers(2, 12),
    modulated=st.booleans(),
    silu=st.booleans(),
    layout=st.sampled_from(["channels_last", "contiguous", "sliced"]),
    mean=st.sampled_from([0.0, 0.0, 10.0, -1e4]),
    seed=SEEDS,
)
def test_group_norm_and_its_gradients(device, batch, groups, size, height, width, modulated, silu, layout, mean, seed):
    shape = batch, groups * size, height, width
    leaves = inputs(shape, layout, modulated=modulated, device=device, seed=seed, mean=mean)
    y, *ours = results(normalized, leaves, groups, silu)
    channels_last = leaves[0].is_contiguous(memory_format=torch.channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    # x holds so many digits fewer than its deviations
    assert worst([y, *ours], on_float64(leaves, groups, silu)) < 1e-5 * max(1.0, abs(mean))


@each_path
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("mean", [0.0, -20.0])
def test_half_precision_is_no_worse_than_pytorch(device, shape, groups, path, dtype, silu, mean):
    leaves = inputs(shape, dtype=dtype, device=device, mean=mean)
    ours, eager = (results(function, leaves, groups, silu) for function in (normalized, in_pytorch))
    assert {each.dtype for each in ours} == {dtype}
    assert_no_worse(ours, eager, on_float64(leaves, groups, silu))


@each_path
def test_gradients_have_the_dtypes_of_their_inputs(device, shape, groups, path):
    leaves = inputs(shape, dtype=torch.bfloat16, parameters=torch.float32, device=device)
    scale, shift = (t.detach().requires_grad_() for t in leaves[3].half().chunk(2, dim=1))
    leaves = [*leaves[:3], scale, shift]

    def norm(x, weight, bias, scale, shift):
        return kernels.group_norm(x, groups, weight, bias, scale=scale, shift=shift, silu=True)

    (_, *ours), (_, *exact) = results(norm, leaves), on_reference(results, norm, doubled(*leaves))
    for leaf, our, right in zip(leaves, ours, exact, strict=True):
        assert our.dtype == leaf.dtype
        rounding = error(right.to(leaf.dtype), right)  # eager PyTorch takes no mixture of dtypes
        assert error(our, right) <= (1e-5 if leaf.dtype == torch.float32 else 1.5 * rounding)


@each_path
def test_a_mean_of_1000_deviations_costs_no_digits(device, shape, groups, path):
    leaves = inputs(shape, device=device)
    with torch.no_grad():
        leaves[0] += 1000
    ours, exact = results(normalized, leaves, groups), on_float64(leaves, groups)
    assert worst(ours[:2], exact[:2]) < 1e-4  # of y and dx; not 1e-5: an ulp of the mean alone is 6e-5 deviations
    x = leaves[0].detach().reshape(shape[0], groups, -1)
    naive = (x.square().mean(-1) - x.mean(-1).square()).abs()
    assert error(naive, x.double().var(-1, unbiased=False)) > 1e-2


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize(("shape", "groups"), [((3, 96, 1, 1), 4), ((1, 12, 1, 7), 1), ((2, 70, 3, 3), 7)])
def test_corners(device, shape, groups, layout):
    leaves = inputs(shape, layout, device=device)
    assert worst(results(normalized, leaves, groups), on_float64(leaves, groups)) < 1e-5


def test_an_empty_batch_stays_empty(device):
    leaves = inputs((0, 8, 4, 4), device=device)
    y, *found = results(normalized, leaves, 2)
    assert y.shape == (0, 8, 4, 4)
    assert all(torch.equal(gradient, torch.zeros_like(leaf)) for leaf, gradient in zip(leaves, found, strict=True))


def test_a_constant_group_gives_the_bias(device):
    x = torch.full((2, 32, 8, 8), 3.0, device=device)
    weight, bias = draw(32, device=device), draw(32, seed=1, device=device)
    torch.testing.assert_close(kernels.group_norm(x, 4, weight, bias), bias[None, :, None, None].expand_as(x))


def test_scale_and_shift_are_read_by_any_strides(device):
    x, weight, bias, _ = inputs((2, 32, 8, 8), device=device)
    one, columns = draw(1, 32, seed=4, device=device), draw(32, 2, seed=5, device=device)
    modulation = {"scale": one.expand(2, 32), "shift": columns.T}
    assert error(*with_reference(kernels.group_norm, x, 4, weight, bias, **modulation)) < 1e-6


def test_float64_runs_the_reference(device):
    leaves = inputs((2, 8, 4, 4), dtype=torch.float64, device=device)
    assert torch.equal(*with_reference(normalized, *leaves, 2))


@each_path
def test_every_run_gives_the_same_bits(device, shape, groups, path):
    leaves = inputs(shape, device=device)
    first, second = (results(normalized, leaves, groups) for _ in range(2))
    assert all(map(torch.equal, first, second))


# --- a bias of what is normalized ---


def biased(x, weight, bias, both, x_bias, groups, silu=True):
    scale, shift = (None, None) if both is None else both.chunk(2, dim=1)
    return kernels.group_norm(x, groups, weight, bias, scale=scale, shift=shift, silu=silu, x_bias=x_bias)


def biased_in_pytorch(x, weight, bias, both, x_bias, groups, silu):
    return in_pytorch(x + x_bias[:, None, None], weight, bias, both, groups, silu)


@each_path
@pytest.mark.parametrize("modulated", [False, True])
def test_a_bias_of_x_and_its_gradient(device, shape, groups, path, modulated):
    leaves = inputs(shape, modulated=modulated, device=device)
    leaves.append((5 * draw(shape[1], seed=7, device=device)).requires_grad_())
    ours, exact = results(biased, leaves, groups), on_reference(results, biased, doubled(*leaves), groups)
    assert worst(ours, exact) < 1e-5


@each_path
@pytest.mark.parametrize("dtype", HALVES)
def test_a_bias_of_x_in_half_precision_is_no_worse_than_pytorch(device, shape, groups, path, dtype):
    leaves = [*inputs(shape, dtype=dtype, device=device), draw(shape[1], seed=7, dtype=dtype, device=device)]
    leaves[4].requires_grad_()
    ours, eager = (results(function, leaves, groups, True) for function in (biased, biased_in_pytorch))
    assert_no_worse(ours, eager, on_reference(results, biased, doubled(*leaves), groups))


@each_path
def test_a_bias_of_x_takes_no_kernel_of_its_own(device, shape, groups, path):
    """And no pass: its gradient is made of what is in the registers when dx is written."""
    leaves = [*inputs(shape, device=device), draw(shape[1], seed=7, device=device).requires_grad_()]
    (y,), forward = names(lambda: biased(*leaves, groups))
    assert forward == path["forward"]
    (found,), backward = names(lambda: gradients(y, leaves))
    assert backward == path["backward"] + PARAMETERS
    alone = [*(t.detach() for t in leaves[:4]), leaves[4]]
    assert torch.equal(*gradients(biased(*alone, groups), alone[4:]), found[4])


# --- what runs, and what moves ---


def names(operation):
    """(what it gives, the kernels that it launched)."""
    result = []
    return result, [launch.kernel.__name__ for launch in launches(lambda: result.append(operation()))]


@each_path
def test_only_what_is_wanted_is_computed(device, shape, groups, path):
    leaves = inputs(shape, device=device)
    (y,), forward = names(lambda: normalized(*leaves, groups))
    assert forward == path["forward"]
    assert names(lambda: gradients(y, leaves))[1] == path["backward"] + PARAMETERS
    frozen = [leaves[0], *(leaf.detach() for leaf in leaves[1:])]
    assert names(lambda: gradients(normalized(*frozen, groups), frozen[:1]))[1] == forward + path["backward"]
    fixed = [leaves[0].detach(), *leaves[1:]]
    without = [name for name in path["backward"] if name != "input_gradient_kernel"]
    assert names(lambda: gradients(normalized(*fixed, groups), fixed[1:]))[1] == forward + without + PARAMETERS


def test_few_programs_take_the_split_path(device, monkeypatch):
    monkeypatch.setattr(MODULE, "multiprocessors", lambda device: 132)
    leaves = inputs((2, 32, 16, 16), device=device)
    (y,), forward = names(lambda: normalized(*leaves, 4))
    assert forward == SPLIT["forward"]
    assert error(y, on_float64(leaves, 4)[0]) < 1e-5


def test_large_float32_tiles_are_split_in_the_backward_pass_alone(device):
    """A tile of 1024 pixels of 16 channels: x fits in registers, but not with its gradient."""
    for dtype, path in ((torch.float32, SPLIT), (torch.bfloat16, ONE_PASS)):
        leaves = inputs((1, 32, 32, 32), dtype=dtype, device=device)
        (y,), forward = names(lambda leaves=leaves: normalized(*leaves, 2))
        assert forward == ONE_PASS["forward"]
        backward = names(lambda y=y, leaves=leaves: gradients(y, leaves))[1]
        assert backward == path["backward"] + PARAMETERS


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "forward", "backward"), [("one pass", 1.0, 1.0), ("padded", 1.0, 1.0), ("split", 1.5, 5 / 3)]
)
def test_images_move_as_often_as_they_must(device, name, forward, backward, dtype):
    """Accesses of x, y, dy and dx over the floor, one each; all else is parameters, statistics and sums."""
    shape, groups, _ = PATHS[name]
    leaves = [*inputs(shape, dtype=dtype, device=device), draw(shape[1], device=device).requires_grad_()]
    image = leaves[0].numel() * dtype.itemsize
    there, back = traffic_of(lambda: biased(*leaves, groups), leaves)
    assert (there.read["x"] + there.written["y"]) / (2 * image) == forward
    assert (back.read["x"] + back.read["dy"] + back.written["dx"]) / (3 * image) == pytest.approx(backward)
    assert max(there.read["y"], back.read["dx"]) == 0


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "groups", "forward", "backward"), [((1, 32, 32, 32), 4, 1.00, 1.00), ((1, 48, 64, 64), 8, 1.50, 5 / 3)]
)
def test_all_else_that_moves_is_little(device, shape, groups, forward, backward):
    leaves = [*inputs(shape, dtype=torch.bfloat16, device=device), draw(shape[1], device=device).requires_grad_()]
    image = 2 * leaves[0].numel()
    there, back = traffic_of(lambda: biased(*leaves, groups), leaves)
    of_bias = there.read["x_bias"]  # by each program again, so that it is in the cache
    assert forward < (there.total() - of_bias) / (2 * image) < forward + 0.03 and of_bias < 0.02 * 2 * image
    assert backward < back.total() / (3 * image) < backward + 0.03


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 24, 7, 9), 1), ((2, 48, 3, 5), 2), ((2, 70, 5, 5), 7), ((1, 6, 23, 25), 2)]
)
def test_tiles_that_reach_beyond_the_image_touch_nothing_there(device, shape, groups):
    """`traffic` refuses accesses out of range, before they happen."""
    leaves = [*inputs(shape, device=device), draw(shape[1], seed=7, device=device).requires_grad_()]
    with traffic():
        found = results(biased, leaves, groups)
    assert worst(found, on_reference(results, biased, doubled(*leaves), groups)) < 1e-5


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "groups", "count"),
    [((131073, 256, 8, 8), 32, 2), ((174764, 192, 8, 8), 32, 4), ((4194305, 512, 1, 1), 32, 2)],
)
def test_offsets_have_64_bits(shape, groups, count):
    """Of images, and of what is kept for each sample and channel where that is large too."""
    x, weight, scale = (meta(*size, dtype=torch.bfloat16) for size in (shape, shape[1:2], shape[:2]))
    x, x_bias = x.contiguous(memory_format=torch.channels_last).requires_grad_(), weight.clone().requires_grad_()

    def forward_and_backward():
        y = kernels.group_norm(x, groups, weight, weight, scale=scale, shift=scale, silu=True, x_bias=x_bias)
        torch.autograd.grad(y, (x, x_bias), torch.empty_like(y))

    large = [one for one in launches(forward_and_backward) if {"x", "dx"} & one.arguments.keys()]
    assert len(large) == count
    for one in large:
        assert_last_program_ends_with_its_tensors(one)


# --- registration ---


@pytest.mark.parametrize(("name", "modulated"), [("one pass", True), ("split", True), ("split", False)])
def test_opcheck(device, name, modulated):
    shape, groups, _ = PATHS[name]
    x, weight, bias, both = (t if t is None else t.detach() for t in inputs(shape, modulated=modulated, device=device))
    scale, shift = both.chunk(2, dim=1) if modulated else (None, None)
    forward = (x, None, weight, bias, scale, shift, bias if modulated else None, groups, 1e-5, True)
    opcheck(torch.ops.fastdiff.group_norm.default, forward)
    y, mean, rstd = torch.ops.fastdiff.group_norm(*forward)
    needed = [True, False, False, True, modulated, False, modulated]
    arguments = (y.contiguous(), x, None, mean, rstd, *forward[2:7], None, None, 1.0, False, True, needed)
    opcheck(torch.ops.fastdiff.group_norm_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(device, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(normalized, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape, groups, _ in PATHS.values():
        leaves = inputs(shape, device=device)
        ours, plain = (results(function, leaves, groups) for function in (compiled, normalized))
        assert all(map(torch.equal, ours, plain))


@each_path
def test_second_derivatives_raise_for_each_input(device, shape, groups, path):
    leaves = inputs(shape, device=device)
    for leaf in leaves:
        (first,) = torch.autograd.grad(normalized(*leaves, groups).square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="group_norm_backward: no second derivative"):
            torch.autograd.grad(first.sum(), leaves[0])
