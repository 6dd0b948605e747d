"""The U-Net: sizes of the presets, every combination of its fields, and what its inputs may be."""

import itertools
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fastdiff import blocks
from fastdiff.unet import PRESETS, UNet, UNetConfig, config_from_dict, sinusoids

SMALL = UNetConfig(
    (8, 8),
    3,
    4,
    channels=16,
    channel_mult=(1, 2),
    blocks=1,
    attention_resolutions=(4,),
    head_width=8,
    guidance_input=True,
)

# Counted once and written down. ADM's ImageNet-64 network is published with 296 million parameters, progressive
# distillation's CIFAR-10 network with about 60; a null label's row is ours.
PARAMETERS = {"cifar10": 60_015_363, "imagenet64": 295_900_035}
FORWARD_FLOPS = {"cifar10": 35_794_714_624, "imagenet64": 219_313_569_792}


def randomise(net: torch.nn.Module, only: str = "", seed: int = 0) -> torch.nn.Module:
    """Replaces the parameters that are all zero, as zero-initialised layers and biases are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if only in name and not parameter.any():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net


def make(config: UNetConfig, seed: int = 0, *, zeros: bool = False) -> UNet:
    torch.manual_seed(seed)
    net = UNet(config).eval()
    return net if zeros else randomise(net, seed=seed)


def inputs(config: UNetConfig, batch: int = 2, seed: int = 0) -> tuple:
    """(z, time, label, guidance) that the config takes."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, config.image_channels, *config.image_size, generator=generator)
    time = torch.rand(batch, generator=generator)
    label = torch.randint(config.num_classes, (batch,), generator=generator) if config.num_classes else None
    guidance = 0.5 + torch.rand(batch, generator=generator) if config.guidance_input else None
    return z, time, label, guidance


@st.composite
def configs(draw) -> UNetConfig:
    levels = draw(st.integers(1, 3))
    patch = draw(st.sampled_from((1, 1, 2, 3)))
    size = tuple(draw(st.integers(1, 3)) * patch * 2 ** (levels - 1) for _ in range(2))
    heights = [size[0] // patch >> level for level in range(levels)]
    channels = 2 * draw(st.integers(2, 6))
    mult = tuple(draw(st.lists(st.integers(1, 3), min_size=levels, max_size=levels)))
    common = math.gcd(*(channels * m for m in mult))
    return UNetConfig(
        image_size=size,
        image_channels=draw(st.integers(1, 5)),
        num_classes=draw(st.sampled_from((0, 1, 7))),
        channels=channels,
        channel_mult=mult,
        blocks=draw(st.integers(1, 2)),
        attention_resolutions=tuple(sorted(draw(st.sets(st.sampled_from(heights))))),
        head_width=draw(st.sampled_from([None] + [d for d in range(1, common + 1) if common % d == 0])),
        patch_size=patch,
        dropout=draw(st.sampled_from((0.0, 0.1))),
        guidance_input=draw(st.booleans()),
        scale_shift=draw(st.booleans()),
        resample=draw(st.sampled_from(("block", "conv", "conv-asymmetric"))),
        resample_skip_conv=draw(st.booleans()),
        residual_scale=draw(st.sampled_from((1.0, 0.5**0.5))),
        groups=draw(st.sampled_from((1, 4, 32))),
        middle_attention=draw(st.booleans()),
        decoder_attention=draw(st.sampled_from(("all", "last"))),
        qkv_order=draw(st.sampled_from(("qkv-head", "head-qkv", "head-width-qkv"))),
        time_scale=draw(st.sampled_from((1.0, 1000.0))),
        time_endpoint=draw(st.booleans()),
        label_before_mlp=draw(st.booleans()),
    )


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_the_published_sizes(name, monkeypatch):
    config = PRESETS[name]
    monkeypatch.setattr(blocks, "fuses", lambda x: False)  # the counter knows no product that adds to its result
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = UNet(config)
        z, time = torch.empty(1, config.image_channels, *config.image_size), torch.empty(1)
        net(z, time, torch.empty(1, dtype=torch.int64))
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    assert counter.get_total_flops() == FORWARD_FLOPS[name]


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_small_presets_run(name):
    config = PRESETS[name]
    net, (z, time, label, guidance) = make(config), inputs(config)
    with torch.no_grad():
        out = net(z, time, label, guidance)
    assert out.shape == z.shape and out.dtype == torch.float32 and out.isfinite().all() and out.any()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(configs())
def test_any_combination_runs_and_trains(config):
    net, (z, time, label, guidance) = make(config), inputs(config)
    net.train()
    out = net(z, time, label, guidance)
    assert out.shape == z.shape and out.dtype == torch.float32 and out.isfinite().all()
    out.square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@settings(max_examples=40, deadline=None, derandomize=True)
@given(configs())
def test_config_round_trips_through_json(config):
    assert config_from_dict(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_json(name):
    assert config_from_dict(json.loads(json.dumps(asdict(PRESETS[name])))) == PRESETS[name]


def test_unknown_fields_are_refused_by_name():
    with pytest.raises(ValueError, match="unknown U-Net fields: chanels, depth"):
        config_from_dict({**asdict(SMALL), "depth": 3, "chanels": 8})


def test_a_new_network_outputs_zeros_and_ignores_guidance():
    net, (z, time, label, guidance) = make(SMALL, zeros=True), inputs(SMALL)
    with torch.no_grad():
        assert torch.equal(net(z, time, label, guidance), torch.zeros_like(z))
        randomise(net, only="conv")  # output and residual branches; the guidance layer is still zero
        at_zero, guided = net(z, time, label, 0 * guidance), net(z, time, label, guidance)
        assert at_zero.any() and torch.equal(guided, at_zero)
        randomise(net, only="guidance_mlp")
        assert (net(z, time, label, guidance) - net(z, time, label, 0 * guidance)).abs().max() > 1e-3


def test_guidance_is_learned_by_training():
    net, (z, time, label, guidance) = randomise(make(SMALL, zeros=True), only="conv"), inputs(SMALL)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    (net(z, time, label, guidance) - z).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(net(z, time, label, guidance), net(z, time, label, guidance + 1))


def test_every_input_matters_to_its_own_sample_only():
    net, (z, time, label, guidance) = make(SMALL), inputs(SMALL)
    with torch.no_grad():
        base = net(z, time, label, guidance)
        second = torch.tensor([False, True])
        changed = {
            "z": net(torch.where(second[:, None, None, None], z + 1, z), time, label, guidance),
            "time": net(z, torch.where(second, time + 0.1, time), label, guidance),
            "label": net(z, time, torch.where(second, (label + 1) % 4, label), guidance),
            "guidance": net(z, time, label, torch.where(second, guidance + 1, guidance)),
        }
    for name, out in changed.items():
        torch.testing.assert_close(out[0], base[0], msg=f"{name} leaks into another sample")
        assert (out[1] - base[1]).abs().max() > 1e-4, name


@pytest.mark.parametrize("label_before_mlp", [False, True])
def test_no_label_is_the_null_label_and_no_guidance_is_zero(label_before_mlp):
    config = replace(SMALL, label_before_mlp=label_before_mlp)
    net, (z, time, label, guidance) = make(config), inputs(config)
    null = torch.full_like(label, config.num_classes)
    with torch.no_grad():
        assert torch.equal(net(z, time, None, guidance), net(z, time, null, guidance))
        assert torch.equal(net(z, time, label, None), net(z, time, label, torch.zeros(2)))
        assert not torch.equal(net(z, time, null, guidance), net(z, time, label, guidance))


@pytest.mark.parametrize("order", ["head-qkv", "head-width-qkv"])
def test_qkv_orders_are_permutations_of_rows(order):
    net, other = make(SMALL), make(replace(SMALL, qkv_order=order), seed=1)
    state = net.state_dict()
    for name in state:
        if ".qkv." in name:
            width = len(state[name]) // 3
            rows = torch.arange(3 * width).view(3, width // SMALL.head_width, SMALL.head_width)  # qkv, head, width
            rows = rows.permute((1, 0, 2) if order == "head-qkv" else (1, 2, 0)).flatten()
            state[name] = state[name][rows]
    other.load_state_dict(state)
    with torch.no_grad():
        expected, found = net(*inputs(SMALL)), other(*inputs(SMALL))
        other.load_state_dict(net.state_dict())
        unpermuted = other(*inputs(SMALL))
    torch.testing.assert_close(found, expected)
    assert (unpermuted - expected).abs().max() > 1e-3


@pytest.mark.parametrize("field", ["residual_scale", "decoder_attention", "time_scale", "time_endpoint", "eps"])
def test_fields_without_parameters_change_the_output(field):
    values = {"residual_scale": 0.5**0.5, "decoder_attention": "last", "time_scale": 1.0, "time_endpoint": True}
    config = replace(SMALL, **{field: values.get(field, 1e-1)})
    net, other = make(SMALL), make(config)
    if field == "decoder_attention":
        assert sum(s.attention is not None for s in other.decoder) < sum(s.attention is not None for s in net.decoder)
        return
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert (other(*inputs(SMALL)) - net(*inputs(SMALL))).abs().max() > 1e-3


@pytest.mark.parametrize("resample", ["block", "conv", "conv-asymmetric"])
def test_non_square_images_are_transposed_like_square_ones(resample):
    """With kernels that are symmetric under transposition, the network commutes with transposing the image."""
    config = replace(SMALL, image_size=(8, 16), attention_resolutions=(), resample=resample)
    net, transposed = make(config), make(replace(config, image_size=(16, 8)))
    state = {k: (v + v.mT) / 2 if v.ndim == 4 else v for k, v in net.state_dict().items()}
    net.load_state_dict(state)
    transposed.load_state_dict(state)
    z, *rest = inputs(config)
    with torch.no_grad():
        out = net(z, *rest)
        assert out.shape == z.shape
        torch.testing.assert_close(transposed(z.mT.contiguous(), *rest), out.mT, rtol=1e-4, atol=1e-5)


def test_attention_resolutions_are_heights():
    config = replace(SMALL, image_size=(8, 16), attention_resolutions=(4,))
    attended = [stage.attention is not None for stage in make(config).encoder]
    assert attended == [False, False, True]
    assert not any(s.attention for s in make(replace(config, attention_resolutions=(16,))).encoder)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_output_is_channels_last_whatever_the_input_is(patch_size):
    config = replace(SMALL, patch_size=patch_size)
    net, (z, *rest) = make(config), inputs(config)
    with torch.no_grad():
        plain, last = net(z, *rest), net(z.contiguous(memory_format=torch.channels_last), *rest)
    assert z.is_contiguous() and not z.is_contiguous(memory_format=torch.channels_last)
    for out in (plain, last):
        assert out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous()
    assert torch.equal(plain, last)


def test_patches_are_channels_of_a_smaller_image():
    config = replace(SMALL, image_size=(8, 12), patch_size=2, attention_resolutions=(4,))
    net = make(config)
    inner = make(replace(config, image_size=(4, 6), image_channels=12, patch_size=1), seed=1)
    inner.load_state_dict(net.state_dict())
    z, *rest = inputs(config)
    patches = z.unflatten(3, (6, 2)).unflatten(2, (4, 2)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    with torch.no_grad():
        out, small = net(z, *rest), inner(patches, *rest)
    expected = small.unflatten(1, (3, 2, 2)).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
    assert out.shape == z.shape
    torch.testing.assert_close(out, expected)


def test_gradient_checkpointing_changes_memory_and_nothing_else():
    config = replace(SMALL, image_size=(16, 16), blocks=2, dropout=0.3, attention_resolutions=(8,))
    net, batch = make(config).train(), inputs(config)

    def run(checkpointing: bool) -> tuple:
        net.gradient_checkpointing = checkpointing
        net.zero_grad()
        saved = {}  # bytes by storage: several views of one tensor cost once

        def pack(tensor):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        torch.manual_seed(0)  # of dropout
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = net(*batch)
        out.square().sum().backward()
        weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
        size = sum(nbytes for pointer, nbytes in saved.items() if pointer not in weights)
        return out.detach(), [p.grad.clone() for p in net.parameters()], size

    plain, gradients, size = run(False)
    again, gradients_again, checkpointed_size = run(True)
    assert torch.equal(again, plain)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))
    assert checkpointed_size < size / 3
    with torch.no_grad():
        assert net(*batch).shape == plain.shape  # and it does nothing where nothing is saved


def test_bfloat16_autocast_is_close():
    net, batch = make(SMALL), inputs(SMALL)
    with torch.no_grad():
        exact = net(*batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = net(*batch)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    assert (rounded - exact).norm() < 0.03 * exact.norm()


def test_batch_rows_do_not_depend_on_each_other():
    net, (z, time, label, guidance) = make(SMALL), inputs(SMALL, batch=3)
    with torch.no_grad():
        together = net(z, time, label, guidance)
        alone = torch.cat([net(z[i : i + 1], time[i : i + 1], label[i : i + 1], guidance[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("endpoint", [False, True])
def test_sinusoids(endpoint):
    values, width = torch.tensor([0.0, 1.0, 1000.0]), 8
    frequencies = [1e-4 ** (i / (3 if endpoint else 4)) for i in range(4)]
    expected = [[f(v * w) for f, w in itertools.product((math.cos, math.sin), frequencies)] for v in values.tolist()]
    torch.testing.assert_close(sinusoids(values, width, endpoint=endpoint), torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("endpoint", [False, True])
def test_sinusoids_of_the_smallest_width_are_finite(endpoint):
    found = sinusoids(torch.tensor([0.5]), 2, endpoint=endpoint)
    torch.testing.assert_close(found, torch.tensor([[math.cos(0.5), math.sin(0.5)]]))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image_size": (30, 32), "channel_mult": (1, 2, 2)}, "30×32 pixels does not divide by 4.*3 levels"),
        ({"image_size": (32, 34), "channel_mult": (1, 2, 2)}, "32×34 pixels does not divide by 4"),
        ({"image_size": (0, 32)}, "0×32"),
        ({"image_size": (4, 8), "channel_mult": (1, 2), "patch_size": 4}, "4×8 pixels does not divide by 8"),
        ({"patch_size": 0}, "patch_size"),
        ({"channels": 7}, "channels must be even"),
        ({"channels": 0}, "positive"),
        ({"blocks": 0}, "positive"),
        ({"image_channels": 0}, "positive"),
        ({"head_width": 24}, "head width 24 does not divide"),
        ({"attention_resolutions": (8,), "middle_attention": False, "head_width": 12}, "head width 12 does not divide"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        UNet(replace(SMALL, **fields))


def test_head_width_is_checked_only_where_there_is_attention():
    UNet(replace(SMALL, head_width=24, attention_resolutions=(), middle_attention=False))


def test_head_width_is_checked_at_every_level_of_one_width():
    """Only the upper of two levels that share a width attends."""
    with pytest.raises(ValueError, match="head width 12 does not divide"):
        UNet(replace(SMALL, channel_mult=(1, 1), attention_resolutions=(8,), middle_attention=False, head_width=12))


@pytest.mark.parametrize("field", ["resample", "decoder_attention", "qkv_order"])
def test_unknown_choices_are_refused(field):
    """A misspelled choice must not silently mean another one."""
    with pytest.raises(ValueError, match="misspelled"):
        UNet(config_from_dict({**asdict(SMALL), field: "misspelled"}))


def test_a_network_without_levels_is_refused():
    with pytest.raises(ValueError, match="channel_mult"):
        UNet(replace(SMALL, channel_mult=()))


def test_edm_cifar10_architecture_has_its_published_size():
    """EDM's DDPM++ for CIFAR-10: 128 channels, [2, 2, 2], 4 blocks, and an input convolution of 128 channels."""
    config = UNetConfig(
        (32, 32),
        3,
        channels=128,
        channel_mult=(2, 2, 2),
        blocks=4,
        attention_resolutions=(16,),
        head_width=None,
        input_mult=1,
        scale_shift=False,
        resample_skip_conv=True,
        residual_scale=0.5**0.5,
        eps=1e-6,
        decoder_attention="last",
        label_before_mlp=True,
        time_endpoint=True,
    )
    with torch.device("meta"):
        network = UNet(config)
    assert network.conv_in.out_channels == 128
    assert sum(p.numel() for p in network.parameters()) == 55_732_739


@pytest.mark.parametrize(
    "changes",
    [{}, {"residual_scale": 0.5**0.5, "scale_shift": False, "resample_skip_conv": True}],
)
def test_what_is_fused_on_a_gpu_changes_nothing(monkeypatch, changes):
    """Nor the gradients."""
    network = randomise(UNet(replace(SMALL, **changes)))
    z, time = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.2, 0.7])

    def results():
        out = network(z, time)
        return out, *torch.autograd.grad(out.square().mean(), [*network.parameters()], allow_unused=True)

    here = results()
    monkeypatch.setattr(blocks, "fuses", lambda x: True)
    for one, other in zip(here, results(), strict=True):
        largest = 0.0 if one is None else float(one.detach().abs().max())
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * largest)
