"""The residual sum and the norm after it, of an image and of one whose channels follow its own, in one pass."""

import sys

import pytest
import torch
from addresses import assert_last_program_ends_with_its_tensors, launches
from helpers import DTYPES, FEW, HALVES, SEEDS, doubled, on_reference, with_reference
from hypothesis import given
from hypothesis import strategies as st
from operations import assert_no_worse, draw, error, meta, worst
from torch.library import opcheck
from traffic import traffic

import kernels

MODULE = sys.modules["kernels.fused.group_norm"]
ONE_PASS = (["one_pass_kernel"], ["one_pass_backward_kernel", "_parameter_gradients_kernel"])
SPLIT = (
    ["stats_kernel", "combine_stats_kernel", "apply_kernel"],
    ["sums_kernel", "combine_sums_kernel", "input_gradient_kernel", "_parameter_gradients_kernel"],
)
PATHS = {  # (shape of the sum, channels of skip, groups): a group of some lies on both sides
    "one pass": ((2, 16, 16, 16), 16, 4, ONE_PASS),
    "one pass alone": ((2, 32, 8, 8), 0, 4, ONE_PASS),
    "padded": ((2, 24, 8, 8), 24, 2, ONE_PASS),
    "small, astride": ((2, 20, 8, 8), 28, 2, SPLIT),
    "split, astride": ((2, 7, 24, 24), 11, 3, SPLIT),
    "split, apart": ((2, 12, 24, 24), 24, 3, SPLIT),
    "split alone": ((2, 12, 24, 24), 0, 2, SPLIT),
}
each_path = pytest.mark.parametrize(("shape", "more", "groups", "path"), PATHS.values(), ids=PATHS)


@pytest.fixture(scope="module", autouse=True)
def small_device():
    """Two programs are two waves here, so that small tensors take the path that large ones do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "multiprocessors", lambda device: 1)
        yield


def inputs(shape, more, dtype=torch.float32, device="cpu", seed=0, summed=True, mean=0.0):
    """Leaves x, h, skip, weight, bias, x_bias; None: h and x_bias where nothing is summed, skip without channels."""
    batch, channels, *size = shape
    sizes = [shape, shape if summed else None, (batch, more, *size) if more else None]
    sizes += [(channels + more,), (channels + more,), (channels,) if summed else None]
    leaves = [
        None if size is None else draw(*size, seed=seed + k, dtype=dtype, device=device, channels_last=len(size) == 4)
        for k, size in enumerate(sizes)
    ]
    leaves[0] = leaves[0] + mean
    return [t if t is None else t.requires_grad_() for t in leaves]


def outcomes(x, h, skip, weight, bias, x_bias, groups, scale=0.7, silu=True):
    norm = skip, groups, weight, bias
    return kernels.residual_norm(x, h, *norm, x_bias=x_bias, scale=scale, silu=silu)


def in_pytorch(x, h, skip, weight, bias, x_bias, groups, scale=0.7, silu=True):
    """What PyTorch alone does, in the dtype of its inputs."""
    total = (x + h + x_bias[:, None, None]) * scale
    image = total if skip is None else torch.cat([total, skip], dim=1)
    y = torch.nn.functional.group_norm(image, groups, weight, bias)
    return torch.nn.functional.silu(y) if silu else y, total, total if skip is None else skip


def gradients(outcome, leaves):
    """With different ones for y, for the total and for skip, which here is half of an image's channels."""
    y, total, skip = outcome
    of_y, of_total, of_skip = (
        draw(len(t), 2 * t.shape[1], *t.shape[2:], seed=9 + k, dtype=torch.bfloat16, channels_last=True)
        .to(t.device, t.dtype)
        .chunk(2, dim=1)[1]
        for k, t in enumerate(outcome)
    )
    wanted = [leaf for leaf in leaves if leaf is not None]
    return torch.autograd.grad((y, total, skip), wanted, (of_y, of_total, of_skip))


def results(function, leaves, *options):
    outcome = function(*leaves, *options)
    return *outcome, *gradients(outcome, leaves)


@FEW
@given(
    batch=st.integers(1, 2),
    channels=st.integers(1, 40),
    more=st.sampled_from([0, 1, 8, 17, 24]),
    size=st.tuples(st.integers(2, 12), st.integers(2, 12)),
    summed=st.booleans(),
    scale=st.sampled_from([1.0, 0.5**0.5]),
    silu=st.booleans(),
    mean=st.sampled_from([0.0, 0.0, 10.0, -1e4]),
    seed=SEEDS,
    data=st.data(),
)
def test_sums_norms_and_their_gradients(device, batch, channels, more, size, summed, scale, silu, mean, seed, data):
    groups = data.draw(st.sampled_from([n for n in range(1, 5) if (channels + more) % n == 0]))
    leaves = inputs((batch, channels, *size), more, device=device, seed=seed, summed=summed, mean=mean)
    options = groups, scale, silu
    y, *ours = results(outcomes, leaves, *options)
    assert y.is_contiguous(memory_format=torch.channels_last)
    # x holds so many digits fewer than its deviations
    exact = on_reference(results, outcomes, doubled(*leaves), *options)
    assert worst([y, *ours], exact) < 1e-5 * max(1.0, abs(mean))


@each_path
def test_values_and_gradients_on_each_path(device, shape, more, groups, path):
    for summed, scale in ((True, 0.7), (True, 1.0), (False, 1.0)):
        leaves = inputs(shape, more, device=device, summed=summed)
        ours = results(outcomes, leaves, groups, scale)
        assert worst(ours, on_reference(results, outcomes, doubled(*leaves), groups, scale)) < 1e-6


@each_path
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_no_worse_than_pytorch(device, shape, more, groups, path, dtype):
    leaves = inputs(shape, more, dtype, device=device)
    ours, eager = (results(function, leaves, groups) for function in (outcomes, in_pytorch))
    assert {each.dtype for each in ours} == {dtype}
    assert_no_worse(ours, eager, on_reference(results, outcomes, doubled(*leaves), groups))


@each_path
def test_the_norm_is_that_of_the_sum_as_it_is_kept(device, shape, more, groups, path):
    """In half precision: of what it was rounded to, so that the backward pass finds the same deviations."""
    leaves = inputs(shape, more, torch.bfloat16, device=device)
    y, total, _ = outcomes(*leaves, groups)
    again, same, _ = kernels.residual_norm(total, None, *leaves[2:3], groups, *leaves[3:5], silu=True)
    assert torch.equal(y, again) and torch.equal(total, same)


@pytest.mark.parametrize("wide", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", ["one pass", "one pass alone", "split, apart"])
def test_other_gradients_may_be_channels_of_wider_images(device, name, wide):
    shape, more, groups, _ = PATHS[name]

    def run(*leaves):
        y, *others = outcomes(*leaves, groups)
        given = [draw(*y.shape, seed=9, channels_last=True).to(y.device, y.dtype)]
        for t, is_wide in zip(others, wide, strict=True):
            image = draw(len(t), 2 * t.shape[1], *t.shape[2:], seed=10, channels_last=True).to(y.device, y.dtype)
            first = image[:, : t.shape[1]]
            given.append(first if is_wide else first.contiguous(memory_format=torch.channels_last))
        return torch.autograd.grad((y, *others), [leaf for leaf in leaves if leaf is not None], given)

    leaves = inputs(shape, more, device=device)
    assert worst(run(*leaves), on_reference(run, *doubled(*leaves))) < 1e-5


@each_path
def test_it_launches_what_a_norm_does(device, shape, more, groups, path):
    for summed in (True, False):
        leaves = inputs(shape, more, device=device, summed=summed)
        found = []
        forward = launches(lambda leaves=leaves, found=found: found.append(outcomes(*leaves, groups, 1.0)))
        backward = launches(lambda leaves=leaves, found=found: gradients(found[0], leaves))
        assert tuple([one.kernel.__name__ for one in each] for each in (forward, backward)) == path
        if not summed:
            _, total, other = found[0]
            assert total.data_ptr() == other.data_ptr() == leaves[0].data_ptr() or more


@each_path
@pytest.mark.parametrize("left", [0, 1, 2])
def test_what_is_not_used_and_what_is_not_wanted(device, shape, more, groups, path, left):
    """Of y, the total and skip one is used; and each input once is the only one that wants a gradient."""
    leaves = inputs(shape, more, device=device)

    def one(wanted):
        used = outcomes(*leaves, groups)[left]
        return torch.autograd.grad(used.square().sum(), wanted, allow_unused=True)

    given = [leaf for leaf in leaves if leaf is not None]
    ours, exact = with_reference(one, given)
    for found, right in zip(ours, exact, strict=True):
        assert found is right is None or error(found, 0 * found if right is None else right) < 1e-5
    for leaf, right in zip(given, exact, strict=True):
        for other in given:
            other.requires_grad_(other is leaf)
        if right is not None:
            (found,) = one([leaf])
            assert error(found, right) < 1e-5
    for leaf in given:
        leaf.requires_grad_()


@each_path
def test_it_is_the_same_without_gradients(device, shape, more, groups, path):
    leaves = inputs(shape, more, device=device)
    plain = outcomes(*leaves, groups)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert all(map(torch.equal, outcomes(*leaves, groups), plain))


def test_images_that_are_not_channels_last_or_of_two_dtypes(device):
    for layout, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        leaves = inputs((2, 16, 8, 8), 16, device=device)
        leaves[1] = leaves[1].detach().to(dtype).requires_grad_()
        if not layout:
            leaves[0] = leaves[0].detach().contiguous().requires_grad_()
        ours, theirs = with_reference(results, outcomes, leaves, 4)
        assert [(t.dtype, t.stride()) for t in ours[:3]] == [(t.dtype, t.stride()) for t in theirs[:3]]
        assert worst(ours, theirs) < 1e-5


def test_an_empty_batch_stays_empty(device):
    leaves = inputs((0, 8, 4, 4), 8, device=device)
    y, total, skip = outcomes(*leaves, 2)
    assert (y.shape, total.shape, skip.shape) == ((0, 16, 4, 4), (0, 8, 4, 4), (0, 8, 4, 4))


@each_path
def test_every_run_gives_the_same_bits(device, shape, more, groups, path):
    leaves = inputs(shape, more, device=device)
    first, second = (results(outcomes, leaves, groups) for _ in range(2))
    assert all(map(torch.equal, first, second))


# --- what moves ---


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PATHS)
def test_images_move_as_often_as_they_must(device, name, dtype):
    """The sum's parts are read once, it is written once; what normalizes it in a second pass reads it again."""
    shape, more, groups, path = PATHS[name]
    leaves = inputs(shape, more, dtype, device=device)
    found = []
    with traffic() as there:
        found.append(outcomes(*leaves, groups))
    with traffic() as back:
        gradients(found[0], leaves)
    one, split = leaves[0].numel() * dtype.itemsize, path is SPLIT
    other = leaves[2].numel() * dtype.itemsize if more else 0
    x_again = there.read["x"] - one  # the second pass knows the total as x
    assert (there.read["h"], there.written["total"], there.written["y"]) == (one, one, one + other)
    assert there.read["total"] + x_again == split * one and there.read["skip"] == (1 + split) * other
    passes = 1 + split
    assert back.read["dy"] == passes * (one + other) and back.read["x"] == passes * one
    assert back.read["skip"] == passes * other and back.written["dskip"] == other
    assert back.read["also"] == one and back.read["other"] == (other or one) and back.written["dx"] == one
    assert max(there.read["y"], back.read["dx"], back.read["dskip"], back.read["h"]) == 0


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "more", "groups"),
    [((2, 24, 7, 9), 8, 1), ((2, 48, 3, 5), 24, 3), ((2, 70, 5, 5), 7, 7), ((1, 6, 23, 25), 6, 2)],
)
def test_tiles_that_reach_beyond_the_images_touch_nothing_there(device, shape, more, groups):
    leaves = inputs(shape, more, device=device)
    with traffic():
        found = results(outcomes, leaves, groups)
    assert worst(found, on_reference(results, outcomes, doubled(*leaves), groups)) < 1e-5


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "more", "groups", "count"), [((139811, 240, 8, 8), 16, 32, 2), ((190651, 176, 8, 8), 16, 32, 4)]
)
def test_offsets_have_64_bits(shape, more, groups, count):
    """The last program's channels are those of skip, those of the one before it are the last ones of the sum."""
    batch, channels, *size = shape
    image, skip = (meta(batch, c, *size, dtype=torch.bfloat16) for c in (channels, more))
    x, skip = (t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in (image, skip))
    weight, x_bias = meta(channels + more), meta(channels).requires_grad_()

    def forward_and_backward():
        out = kernels.residual_norm(x, x.detach(), skip, groups, weight, weight, x_bias=x_bias)
        torch.autograd.grad(out, (x, skip, x_bias), [torch.empty_like(t) for t in out])

    large = [one for one in launches(forward_and_backward) if {"x", "dx"} & one.arguments.keys()]
    assert len(large) == count
    for one in large:
        assert_last_program_ends_with_its_tensors(one, last=2)


# --- registration ---


@pytest.mark.parametrize("name", ["one pass", "one pass alone", "split, astride"])
def test_opcheck(device, name):
    shape, more, groups, _ = PATHS[name]
    x, h, skip, weight, bias, x_bias = (t if t is None else t.detach() for t in inputs(shape, more, device=device))
    forward = (x, h, skip, weight, bias, x_bias, 0.7, groups, 1e-5, True)
    opcheck(torch.ops.fastdiff.residual_norm.default, forward)
    y, mean, rstd, total = torch.ops.fastdiff.residual_norm(*forward)
    norm = (mean, rstd, weight, bias, None, None, x_bias)
    needed = [True, skip is not None, False, True, False, False, True]
    arguments = (y.contiguous(), total, skip, *norm, h, skip, 0.7, True, True, needed)
    opcheck(torch.ops.fastdiff.group_norm_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(device, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(outcomes, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape, more, groups, _ in PATHS.values():
        leaves = inputs(shape, more, device=device)
        ours, plain = (results(function, leaves, groups) for function in (compiled, outcomes))
        assert worst(ours, plain) < 1e-6


@each_path
def test_second_derivatives_raise_for_each_input(device, shape, more, groups, path):
    leaves = inputs(shape, more, device=device)
    for leaf in leaves:
        if leaf is not None:
            y, total, skip = outcomes(*leaves, groups)
            loss = y.square().sum() + total.square().sum() + skip.square().sum()
            (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
            with pytest.raises(RuntimeError, match="group_norm_backward: no second derivative"):
                torch.autograd.grad(first.sum(), leaves[0])


def test_torch_func_takes_its_gradient(device):
    x, h, skip, weight, bias, x_bias = (t.detach() for t in inputs((2, 16, 8, 8), 16, device=device))

    def loss(x):
        y, total, beside = kernels.residual_norm(x, h, skip, 4, weight, bias, x_bias=x_bias)
        return y.square().sum() + (total * total).sum() + beside.sum()

    assert error(*with_reference(torch.func.grad(loss), x)) < 1e-5
