"""torch.compile traces a U-Net in one piece, on the CPU, and with the Triton operators on tensors that have no data."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from operations import NAMES, SHAPE, operations
from torch._subclasses import FakeTensorMode

import kernels
from fastdiff.unet import PRESETS, UNet, UNetConfig
from kernels import backend
from kernels.fused.launch import listen

SMALL = UNetConfig((8, 8), 3, 10, channels=16, channel_mult=(1,), blocks=1, attention_resolutions=(8,), head_width=16)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


MODES = {
    "gradients": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
}


def compiled_in_one_piece(function, *arguments):
    """What it gives, and its only graph, as text."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    result = torch.compile(function, fullgraph=True, backend=backend)(*arguments)
    (graph,) = graphs
    return result, graph


def arguments(config: UNetConfig, device: str):
    z = torch.empty(2, config.image_channels, *config.image_size, device=device).fill_(0.5)
    return z, torch.full((2,), 0.5, device=device), torch.zeros(2, dtype=torch.int64, device=device)


@pytest.mark.parametrize("forced", [None, "reference"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_unet_on_the_cpu_has_no_graph_breaks(forced, precision):
    torch.manual_seed(0)
    network = UNet(SMALL)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with kernels.use(forced), torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        ours, plain = (call(*arguments(SMALL, "cpu")) for call in (compiled, network))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    first, second = (torch.autograd.grad(out.square().sum(), network.conv_in.weight)[0] for out in (ours, plain))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3 * float(second.abs().max()))


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_cpu_compiler_keeps_every_gradient_in_bf16():
    """It once gave zeros for all that comes before an upsampling with a convolution, and nobody was told."""
    torch.manual_seed(0)
    unet = UNet(replace(PRESETS["digits"], channels=8))
    for parameter in unet.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    z, weights = torch.randn(2, 4, 1, 8, 8).unbind()

    def gradients(*, half: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = unet(z, torch.linspace(0.1, 0.9, 4), torch.arange(4))
        return torch.autograd.grad((out.float() * weights).sum(), list(unet.parameters()))

    def error(found) -> float:
        pairs = zip(found, exact, strict=True)
        return sum((a - b).square().sum() for a, b in pairs) ** 0.5 / sum(b.square().sum() for b in exact) ** 0.5

    exact, eager = gradients(half=False), gradients(half=True)
    unet.compile()
    assert error(gradients(half=True)) < 1.5 * error(eager) < 0.05


@pytest.mark.parametrize(("config", "mode"), [(PRESETS["cifar10"], "gradients"), *((SMALL, mode) for mode in MODES)])
def test_a_unet_of_triton_operators_has_no_graph_breaks(config, mode):
    """Traced on the meta device, where operators allocate and launch nothing."""
    pytest.importorskip("triton")
    with torch.device("meta"):
        network = UNet(config)
    with kernels.use("triton"), MODES[mode]():
        out, graph = compiled_in_one_piece(network, *arguments(config, "meta"))
    assert out.shape == (2, 3, *config.image_size)
    assert "fastdiff.group_norm" in graph and "fastdiff.attention" in graph


@pytest.mark.parametrize("wanted", [True, False], ids=["x wants a gradient", "x wants none"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_each_triton_operator_is_traced_with_gradients_and_without(name, mode, wanted):
    pytest.importorskip("triton")
    x = torch.empty(SHAPE, device="meta", requires_grad=wanted)
    function = operations("meta")[name]
    with kernels.use("triton"), MODES[mode]():
        (compiled, graph), plain = compiled_in_one_piece(function, x), function(x)
    assert (compiled.shape, compiled.dtype, compiled.stride()) == (plain.shape, plain.dtype, plain.stride())
    assert compiled.requires_grad == plain.requires_grad == (wanted and mode in ("gradients", "autocast"))
    operator = "group_norm" if name == "residual_norm" else name  # compilers see to the sum
    assert f"fastdiff.{operator}" in graph
    if compiled.requires_grad:
        assert torch.autograd.grad(compiled, x, torch.empty_like(compiled))[0].shape == x.shape


def test_fake_cuda_tensors_run_the_triton_operators():
    """Without CUDA no fake gradient can be had, nor a slice; forward operators give shapes, dtypes and layouts."""
    pytest.importorskip("triton")
    launched = []
    with FakeTensorMode(), torch.no_grad(), listen(lambda launch: launched.append(launch.kernel.fn.__name__)):
        empty = partial(torch.empty, device="cuda")
        image = empty(4, 64, 16, 16, dtype=torch.bfloat16, memory_format=torch.channels_last)
        coef, weight = empty(4), empty(64)
        key = {"seed": 2**64 - 1, "sample_ids": empty(4, dtype=torch.int64), "step": 2**31}
        state = kernels.affine_update(image, image, coef_z=coef, coef_a=coef, clip=1.0, coef_noise=coef, **key)
        assert (state.dtype, state.device.type) == (torch.float32, "cuda")
        assert state.is_contiguous(memory_format=torch.channels_last)
        assert kernels.add_noise(state, coef, **key)[1].stride() == state.stride()
        coefs = {"coef_z": coef, "coef_a": coef, "coef_b": None, "weight": coef}
        loss = kernels.affine_regression_loss(image, state, image, None, **coefs)
        assert (loss.shape, loss.dtype) == ((4,), torch.float32)
        assert kernels.sid_generator_loss(state, state, image, 1.2).shape == (4,)
        normed = kernels.group_norm(image, 32, weight, weight, silu=True)
        assert (normed.dtype, normed.stride()) == (image.dtype, image.stride())
        assert kernels.attention(empty(4, 64, 192, dtype=torch.bfloat16), 1).shape == (4, 64, 64)
        from kernels import fused

        assert backend.implementation("group_norm", image) is fused.group_norm  # which launches nothing on fake tensors
    assert set(launched) == {"_update_kernel", "_loss_kernel", "_forward_kernel"}
