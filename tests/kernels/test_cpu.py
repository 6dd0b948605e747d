"""GroupNorm on the CPU, by each of the ways that it may take there, against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from operations import assert_no_worse, error, worst
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

import kernels
from kernels import cpu, reference

CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
HALF = [torch.bfloat16, torch.float16]
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def force(patch, chunk: int = 300) -> None:
    """Chunks for every channels-last input, however small, and more than one of them."""
    usual = cpu.group_norm

    def in_chunks(x, groups, weight, bias, eps, *, scale, shift, silu):
        if not x.is_contiguous(memory_format=CHANNELS_LAST):
            return usual(x, groups, weight, bias, eps, scale=scale, shift=shift, silu=silu)
        training = torch.is_grad_enabled() and cpu._any_requires_grad(x, weight, bias, scale, shift)
        return cpu._in_chunks(x, groups, weight, bias, eps, scale, shift, silu, training)

    patch.setattr(cpu, "group_norm", in_chunks)
    patch.setattr(cpu, "CHUNK", chunk)


@pytest.fixture
def chunked(monkeypatch):
    force(monkeypatch)


def make(shape, dtype=torch.float32, layout=CHANNELS_LAST, parameters=None, modulated=True, mean=0.0, std=1.0, seed=0):
    """[x, weight, bias, scale, shift] and the gradient of the result.

    Every gradient is a sum of terms most of which have one sign, lest it be a small difference of large numbers, of
    which no float32 arithmetic keeps five digits: that of the result grows with it, and the parameters follow suit.
    """
    draw = torch.Generator().manual_seed(seed)
    batch, channels = shape[:2]
    z, noise, weight, bias, scale, shift = (
        torch.randn(s, generator=draw, dtype=torch.float64)
        for s in (shape, shape, (channels,), (channels,), (batch, channels), (batch, channels))
    )
    dy = (1 + weight.sign()[:, None, None] * z + noise).to(dtype)
    weight, bias, scale = weight.sign() * (0.5 + weight.abs()), 0.5 + bias.abs(), scale.abs()
    others = (weight, bias, scale, shift) if modulated else (weight, bias)
    x = (mean + std * z).to(dtype).contiguous(memory_format=layout)
    inputs = [t.requires_grad_() for t in (x, *(t.to(parameters or dtype) for t in others))]
    return inputs, dy.contiguous(memory_format=layout)


def run(function, inputs, groups, silu=True):
    x, weight, bias, scale, shift = (*inputs, None, None)[:5]
    return function(x, groups, weight, bias, 1e-5, scale=scale, shift=shift, silu=silu)


def all_results(function, inputs, dy, groups, silu=True):
    """The result and the gradient of every input."""
    y = run(function, inputs, groups, silu)
    return y, *torch.autograd.grad(y, inputs, dy)


def exact_results(inputs, dy, groups, silu=True):
    wide = [t.detach().double().requires_grad_() for t in inputs]
    return all_results(reference.group_norm, wide, dy.double(), groups, silu)


def assert_exact(*arguments, limit=1e-5):
    assert worst(all_results(cpu.group_norm, *arguments), exact_results(*arguments)) < limit


def torch_results(*arguments):
    return all_results(by_torch, *arguments)


def by_torch(x, groups, weight, bias, eps, *, scale, shift, silu):
    weight, bias, scale, shift = (t if t is None else t.to(x.dtype) for t in (weight, bias, scale, shift))
    y = F.group_norm(x, groups, weight, bias, eps)
    if scale is not None:
        y = torch.addcmul(shift[:, :, None, None], y, 1 + scale[:, :, None, None])
    return F.silu(y) if silu else y


@st.composite
def cases(draw, dtypes, groups, parameters=(None,), means=(0.0, 1.0, -10.0)):
    size = st.integers(1, 9)
    batch, groups, width = draw(st.integers(1, 5)), draw(groups), draw(st.sampled_from([1, 2, 3, 4, 16]))
    height, breadth = draw(size), draw(size)
    assume(width * height * breadth >= 8)  # with fewer, gradients of x cancel to nothing
    inputs, dy = make(
        (batch, groups * width, height, breadth),
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from([CHANNELS_LAST, CONTIGUOUS])),
        draw(st.sampled_from(parameters)),
        modulated=draw(st.booleans()),
        mean=draw(st.sampled_from(means)),
        seed=draw(st.integers(0, 99)),
    )
    return inputs, dy, groups, draw(st.booleans()), draw(st.sampled_from([1, 300, cpu.CHUNK]))


@settings(max_examples=120, deadline=None)
@given(cases([torch.float32, torch.float64], st.integers(1, 5), means=(0.0, 1.0, 100.0, -1e4)))
def test_results_and_gradients_are_the_references_in_float64(case):
    *arguments, chunk = case
    far = max(1.0, arguments[0][0].detach().abs().max().item())  # x holds so many digits fewer than its deviations
    with pytest.MonkeyPatch.context() as patch:
        force(patch, chunk)
        assert_exact(*arguments, limit=far * (1e-5 if arguments[1].dtype == torch.float32 else 1e-13))


# Of fewer than 32 numbers all of PyTorch's may be rounded well by chance.
@settings(max_examples=100, deadline=None)
@given(cases(HALF, st.integers(32, 40), parameters=[None, torch.float32]))
def test_half_precision_is_no_worse_than_pytorch_in_half_precision(case):
    *arguments, chunk = case
    inputs, dy = arguments[:2]
    with pytest.MonkeyPatch.context() as patch:
        force(patch, chunk)
        found = all_results(cpu.group_norm, *arguments)
    assert [t.dtype for t in found] == [dy.dtype, *(t.dtype for t in inputs)]
    assert_no_worse_than_pytorch(found, *arguments)


def assert_no_worse_than_pytorch(found, *arguments):
    """Within 1.5 times its errors in the dtype of the image, for the result and, if given, every gradient."""
    assert_no_worse(found, *(results(*arguments)[: len(found)] for results in (torch_results, exact_results)))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS])
@pytest.mark.parametrize("parameters", [None, torch.float32])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("way", ["_by_pytorch", "_widened", "_in_chunks"])
def test_so_is_each_way_without_gradients(way, modulated, parameters, layout, dtype):
    inputs, dy = make((3, 64, 8, 8), dtype, layout, parameters, modulated)
    scale, shift = inputs[3:] or (None, None)
    with torch.no_grad():
        found = getattr(cpu, way)(inputs[0], 32, *inputs[1:3], 1e-5, scale, shift, modulated, training=False)
    assert found.dtype == dtype
    assert_no_worse_than_pytorch([found], inputs, dy, 32, modulated)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 6, 3, 4), 3), ((2, 8, 1, 1), 2), ((3, 2, 9, 1), 2), ((2, 5, 2, 3), 1)]
)
def test_gradients_are_derivatives(chunked, shape, groups, modulated, silu):
    inputs, _ = make(shape, torch.float64, modulated=modulated)
    assert gradcheck(lambda *inputs: run(cpu.group_norm, inputs, groups, silu), inputs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS])
@pytest.mark.parametrize("mean", [0.0, 0.7, 1.4, 1.6, 3.0, -10.0, 100.0, 1e3, -1e4, 1e6])
@pytest.mark.parametrize(
    ("shape", "groups"), [((1, 8, 32, 32), 2), ((2, 32, 8, 8), 8), ((2, 64, 16, 16), 2), ((2, 8, 4, 4), 8)]
)
def test_each_way_is_about_as_good_as_the_reference_for_any_mean(shape, groups, mean, layout, training):
    """PyTorch subtracts squares where x is channels-last: errors of 1e-4 at 10, and more than all there is at 1e4."""
    inputs, dy = make(shape, layout=layout, mean=mean, modulated=False)
    found, usual, exact = (
        results(*arguments, silu=False)
        for results, arguments in (
            (all_results, (cpu.group_norm, inputs, dy, groups)),
            (all_results, (reference.group_norm, inputs, dy, groups)),
            (exact_results, (inputs, dy, groups)),
        )
    )
    if not training:
        with torch.no_grad():
            found = [run(cpu.group_norm, inputs, groups, silu=False)]
    for one, other, right in zip(found, usual, exact, strict=False):
        assert error(one, right) <= 12 * error(other, right) + 3e-7


@both_dtypes
def test_one_group_far_from_0_is_enough(dtype):
    inputs, dy = make((3, 32, 8, 8), dtype)
    with torch.no_grad():
        inputs[0][1, 8:16] += 50
    found = all_results(cpu.group_norm, inputs, dy, 4)
    if dtype == torch.float32:
        assert worst(found, exact_results(inputs, dy, 4)) < 1e-5
    else:
        assert_no_worse(found, all_results(reference.group_norm, inputs, dy, 4), exact_results(inputs, dy, 4))


def test_what_is_not_finite_stays_so():
    inputs, _ = make((2, 16, 4, 4), modulated=False)
    with torch.no_grad():
        inputs[0][0, 0, 0, 0] = torch.nan
        y = run(cpu.group_norm, inputs, 4, silu=False)
    assert y[0, :4].isnan().all() and y[0, 4:].isfinite().all() and y[1].isfinite().all()


@pytest.mark.parametrize(("mean", "std"), [(100.0, 0.1), (-3e4, 2.0), (1e-3, 1e-6), (0.0, 1e4)])
def test_a_large_mean_costs_no_digits(chunked, mean, std):
    assert_exact(*make((3, 16, 8, 8), mean=mean, std=std), 8, limit=2e-6)


def test_an_eighth_of_the_pixels_may_be_unlike_the_others(chunked):
    """The center comes from every eighth pixel alone."""
    inputs, dy = make((3, 16, 8, 8))
    with torch.no_grad():
        inputs[0].permute(0, 2, 3, 1).flatten(1, 2)[:, ::8] += 1e4
    assert_exact(inputs, dy, 8)


def test_a_constant_image_has_no_variance_to_divide_by(chunked):
    inputs, _ = make((2, 8, 4, 4), mean=7.0, std=0.0, modulated=False)
    torch.testing.assert_close(run(cpu.group_norm, inputs, 4, silu=False), inputs[2][:, None, None].expand(2, 8, 4, 4))


def layouts(x):
    return {
        "channels-last": x.contiguous(memory_format=CHANNELS_LAST),
        "contiguous": x.contiguous(),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "strided": x.repeat(1, 1, 1, 2)[..., ::2],
        "expanded": x[:1].expand_as(x),
    }


@pytest.mark.parametrize("way", ["chosen", "chunked"])
@both_dtypes
@pytest.mark.parametrize("layout", layouts(torch.zeros(2, 4, 3, 5)))
def test_memory_layout_is_the_references(monkeypatch, layout, dtype, way):
    if way == "chunked":
        force(monkeypatch)
    inputs, _ = make((3, 16, 6, 5), dtype)
    inputs[0] = layouts(inputs[0].detach())[layout]
    found, wanted = (run(module.group_norm, inputs, 8) for module in (cpu, reference))
    assert (found.stride(), found.dtype) == (wanted.stride(), wanted.dtype)
    assert error(found, wanted) < 2 * torch.finfo(dtype).eps


def test_the_gradient_may_come_in_any_layout(chunked):
    inputs, dy = make((3, 8, 4, 4))
    for gradient in (dy.contiguous(), torch.ones(()).expand_as(dy)):
        assert_exact(inputs, gradient, 4)


def test_inputs_and_gradients_stay_as_they_were(chunked):
    inputs, dy = make((3, 8, 4, 4))
    before = [t.clone() for t in (*inputs, dy)]
    all_results(cpu.group_norm, inputs, dy, 4)
    for now, then in zip((*inputs, dy), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)


@both_dtypes
def test_an_empty_batch_works(chunked, dtype):
    y, *gradients = all_results(cpu.group_norm, *make((0, 8, 4, 4), dtype), 4)
    assert y.shape == (0, 8, 4, 4)
    assert [t.shape for t in gradients] == [(0, 8, 4, 4), (8,), (8,), (0, 8), (0, 8)]
    assert not any(t.any() for t in gradients)


@pytest.mark.parametrize("of", range(5))
def test_only_one_input_may_need_a_gradient(chunked, of):
    inputs, dy = make((3, 8, 4, 4))
    wanted = exact_results(inputs, dy, 4)[1 + of]
    alone = [t.detach().requires_grad_(i == of) for i, t in enumerate(inputs)]
    (found,) = torch.autograd.grad(run(cpu.group_norm, alone, 4), alone[of], dy)
    assert error(found, wanted) < 1e-5


def test_differentiating_twice_raises(chunked):
    inputs, dy = make((2, 8, 4, 4))
    for of in (dy, dy.clone().requires_grad_()):
        for gradient in torch.autograd.grad(run(cpu.group_norm, inputs, 4), inputs, of, create_graph=True):
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(gradient.sum(), inputs, retain_graph=True, allow_unused=True)


def test_nested_functional_gradients_raise(chunked):
    (x, *others), _ = make((2, 8, 4, 4))

    def slope(x):
        return torch.func.grad(lambda x: run(cpu.group_norm, [x, *others], 4).square().sum())(x).square().sum()

    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(slope)(x)
    with pytest.raises(RuntimeError, match=r"jvp|derivative"):
        torch.func.jvp(slope, (x,), (x,))


def test_forward_mode_raises_instead_of_returning_zeros(chunked):
    inputs, tangent = make((2, 8, 4, 4))
    for x, *others in (inputs, [t.detach() for t in inputs]):
        with pytest.raises(RuntimeError, match=r"jvp|automatic differentiation|forward"):
            torch.func.jvp(lambda x, others=others: run(cpu.group_norm, [x, *others], 4), (x,), (tangent,))


def test_functional_gradients_work(chunked):
    inputs, dy = make((2, 8, 4, 4))
    found = torch.func.grad(lambda *inputs: (run(cpu.group_norm, inputs, 4) * dy).sum(), tuple(range(5)))(*inputs)
    assert worst(found, exact_results(inputs, dy, 4)[1:]) < 1e-5


@both_dtypes
def test_compiles_whole_in_both_directions(dtype):
    inputs, dy = make((64, 32, 8, 8), dtype)
    compiled = torch.compile(kernels.group_norm, fullgraph=True, backend="aot_eager")
    results = [all_results(f, inputs, dy, 32) for f in (compiled, kernels.group_norm)]
    with torch.no_grad():
        results.append([run(compiled, inputs, 32)])
    wanted = exact_results(inputs, dy, 32)
    for found in results:
        if dtype == torch.float32:
            assert worst(found, wanted[: len(found)]) < 1e-5
        else:
            assert_no_worse_than_pytorch(found, inputs, dy, 32)


def test_the_chunks_themselves_compile_whole(chunked):
    inputs, dy = make((3, 8, 4, 4))
    compiled = torch.compile(cpu.group_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(all_results(compiled, inputs, dy, 4), all_results(reference.group_norm, inputs, dy, 4))


@both_dtypes
def test_works_on_fake_tensors(chunked, dtype):
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(t.detach()).requires_grad_() for t in make((3, 8, 4, 4), dtype)[0]]
        y = run(cpu.group_norm, inputs, 4)
        assert (y.shape, y.dtype) == ((3, 8, 4, 4), dtype)
        assert y.is_contiguous(memory_format=CHANNELS_LAST)
        y.sum().backward()
    assert [t.grad.shape for t in inputs] == [t.shape for t in inputs]


def ways(monkeypatch, x, groups, **options):
    """Which of the ways `kernels.group_norm` takes, and whether it widens x for it."""
    taken = []

    def note(name, image):
        taken.append(name if image.dtype == x.dtype else f"{name} in {str(image.dtype).removeprefix('torch.')}")

    for module, name in ((cpu, "_in_chunks"), (cpu, "_widened"), (cpu, "_by_pytorch"), (reference, "group_norm")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=function, _n=name, **k: (note(_n, a[0]), _f(*a, **k))[1])
    weight = torch.ones(x.shape[1], requires_grad=options.pop("training", False))
    kernels.group_norm(x, groups, weight, torch.zeros(x.shape[1]), **options)
    monkeypatch.undo()
    return taken


@both_dtypes
@pytest.mark.parametrize("training", [False, True])
def test_few_channels_per_group_run_in_chunks_unless_the_reference_is_forced(monkeypatch, dtype, training):
    x = torch.zeros(64, 32, 8, 8, dtype=dtype).contiguous(memory_format=CHANNELS_LAST)
    assert ways(monkeypatch, x, 32, training=training) == ["_in_chunks"]
    with kernels.use("reference"):
        assert ways(monkeypatch, x, 32, training=training) == ["group_norm"]


def test_other_inputs_run_where_pytorch_is_fast(monkeypatch):
    last = {"memory_format": CHANNELS_LAST}
    x = torch.zeros(64, 32, 8, 8)
    for fast in (x, x.contiguous(**last)[:1], x.double().contiguous(**last)):
        assert ways(monkeypatch, fast, 32) == ["_by_pytorch"]
    assert ways(monkeypatch, x.contiguous(**last), 4) == ["_by_pytorch"]
    assert ways(monkeypatch, x.transpose(2, 3), 32) == ["group_norm"]
    assert ways(monkeypatch, x.bfloat16(), 32) == ["_by_pytorch"]
    assert ways(monkeypatch, x.bfloat16().contiguous(**last), 2) == ["_by_pytorch"]
    assert ways(monkeypatch, x.bfloat16().contiguous(**last), 4) == ["_widened", "_by_pytorch in float32"]


def test_large_images_run_in_chunks_in_training_alone(monkeypatch):
    x = torch.zeros(16, 64, 32, 32).contiguous(memory_format=CHANNELS_LAST)
    for image in (x, x.bfloat16()):
        assert ways(monkeypatch, image, 32) == ["_by_pytorch"]
        assert ways(monkeypatch, image, 32, training=True) == ["_in_chunks"]


def test_no_limit_allows_a_nan():
    """As Python's own `max` would, which keeps what is compared first."""
    assert not worst([torch.ones(3), torch.full((3,), torch.nan)], [torch.ones(3)] * 2) < torch.inf
