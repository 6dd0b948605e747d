"""Weights cast in one go: the same bits as autocast's own casts, in fewer launches."""

import copy
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from common import TINY, randomize
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import cast, precision, translate
from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.generate import Sampling, generate
from fastdiff.unet import UNet, UNetConfig

SMALL = UNetConfig((8, 8), 3, 4, channels=16, channel_mult=(1, 2), blocks=1, attention_resolutions=(4,), head_width=8)
INPUTS = torch.linspace(-1, 1, 384).sin().reshape(2, 3, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([1, 4])


@pytest.fixture
def network() -> UNet:
    network, generator = UNet(replace(SMALL, guidance_input=True)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def results(network: UNet, *, backward: bool = True) -> list[torch.Tensor | None]:
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = network(*INPUTS)
    if backward:
        out.square().mean().backward()
    return [out, *(parameter.grad for parameter in network.parameters())]


def with_autocasts_own(monkeypatch, network: UNet, **how) -> list[torch.Tensor | None]:
    with monkeypatch.context() as patch:
        patch.setattr(cast, "autocast_dtype", lambda device: None)
        return results(network, **how)


def assert_same_bits(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == torch.float32 and torch.equal(one, other))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_results_and_gradients_have_the_same_bits(monkeypatch, network, checkpointing, frozen):
    network.gradient_checkpointing = checkpointing
    network.encoder.requires_grad_(not frozen)
    ours, theirs = results(network), with_autocasts_own(monkeypatch, copy.deepcopy(network))
    assert_same_bits(ours, theirs)
    assert any(gradient is None for gradient in ours) == frozen


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(monkeypatch, network, mode):
    with mode():
        assert_same_bits(results(network, backward=False), with_autocasts_own(monkeypatch, network, backward=False))


def test_two_calls_add_their_gradients(network):
    once = [None if gradient is None else gradient.clone() for gradient in results(network)[1:]]
    with torch.autocast("cpu", torch.bfloat16):
        (network(*INPUTS).square().mean() + network(*INPUTS).square().mean()).backward()
    for gradient, parameter in zip(once, network.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, None if gradient is None else 3 * gradient)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_network_keeps_the_weights_that_autocast_would_make(network, checkpointing):
    """Gradients pass through it, as in SiD."""
    network.requires_grad_(False).gradient_checkpointing = checkpointing
    kept, z = copy.deepcopy(network), INPUTS[0].clone().requires_grad_()
    cast.cast_for_good(kept, torch.bfloat16)

    def result(network) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            out = network(z, *INPUTS[1:])
        return out, torch.autograd.grad(out.square().mean(), z)[0]

    expected = result(network)
    with Counted({parameter.data_ptr() for parameter in kept.parameters()}) as counted:
        assert_same_bits(result(kept), expected)
    assert not counted.calls
    matrices = {parameter.dtype for parameter in kept.parameters() if parameter.ndim > 1}
    assert matrices == {torch.bfloat16, torch.float32}  # the latter are embeddings


class Counted(TorchDispatchMode):
    def __init__(self, weights: set[int]):
        super().__init__()
        self.weights, self.calls = weights, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name == "_foreach_copy_" or (name == "_to_copy" and args[0].data_ptr() in self.weights):
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_weights_are_cast_together_and_all_gradients(network, checkpointing):
    network.gradient_checkpointing = checkpointing
    with Counted({parameter.data_ptr() for parameter in network.parameters()}) as counted:
        results(network)
    assert counted.calls == {"_foreach_copy_": 2}


def test_the_parameters_are_back_afterwards_even_if_it_fails(network):
    before = dict(network.named_parameters())
    results(network)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
        network(torch.zeros(2, 5, 8, 8), *INPUTS[1:])
    after = dict(network.named_parameters())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)


def test_without_autocast_nothing_is_cast(network):
    with Counted(set()) as counted:
        network(*INPUTS)
    assert not counted.calls


def test_what_lies_in_parts_is_left_to_autocast(network):
    class Part(torch.Tensor):
        """As a process's part of a sharded tensor, a type of its own."""

    network.conv_in.weight = torch.nn.Parameter(network.conv_in.weight.detach().as_subclass(Part))
    with cast.CastWeights(network, torch.bfloat16):
        assert network.conv_in.weight.dtype == torch.float32 and network.conv_out.weight.dtype == torch.bfloat16


@pytest.fixture
def model() -> Denoiser:
    return randomize(Denoiser(DenoiserConfig(TINY))).eval()


def as_before(monkeypatch, work):
    """What it returns where each call of a network casts for itself."""
    with monkeypatch.context() as patch:
        patch.setattr(precision, "as_autocast", lambda network, device: nullcontext())
        return work()


def assert_cast(times: int, model: Denoiser, work):
    before = dict(model.named_parameters())
    with Counted({parameter.data_ptr() for parameter in model.parameters()}) as counted:
        result = work()
    assert counted.calls == {"_foreach_copy_": times}
    after = dict(model.named_parameters())
    assert all(before[name] is after[name] for name in before)
    return result


@pytest.mark.parametrize(("guidance", "sampler"), [(0.0, "ddim"), (1.0, "ddim"), (1.0, "ancestral")])
def test_a_sampler_casts_the_weights_once_a_batch(monkeypatch, model, guidance, sampler):
    sampling = Sampling(guidance=guidance, sampler=sampler, steps=4, precision="bf16", batch_size=3)

    def images() -> torch.Tensor:
        return torch.cat(list(generate(model, 6, sampling)))

    found = assert_cast(2, model, images)
    expected = as_before(monkeypatch, lambda: assert_cast(8, model, images))
    assert torch.equal(found, expected)


def test_a_translation_casts_them_once(monkeypatch, model):
    encoder, label, images = model, torch.tensor([1, 2]), torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
    pair = translate.Pair(encoder, model, 3, 3)

    def translated() -> torch.Tensor:
        return pair.translate(images, label, label, 0.0, precision="bf16")

    found = assert_cast(1, model, translated)
    assert torch.equal(found, as_before(monkeypatch, lambda: assert_cast(6, model, translated)))


def test_compiled_networks_and_those_of_ones_own_cast_for_themselves(monkeypatch, model):
    monkeypatch.setattr(precision, "as_autocast", None)  # would fail
    device = torch.device("cpu")
    model.network.compile(backend="eager")
    with precision.autocast("bf16", device, model):
        pass
    model.network._compiled_call_impl = None
    model.config = replace(model.config, network="mine")
    with precision.autocast("bf16", device, model):
        pass
    with precision.autocast("fp32", device, model):
        assert not torch.is_autocast_enabled("cpu")
