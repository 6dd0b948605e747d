"""Samplers on Gaussian data, where the exact denoiser and the exact flow are closed forms; guidance; generate()."""

import inspect
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from common import wide
from torch import nn

import kernels
from fastdiff import rotation, samplers
from fastdiff.denoiser import Denoiser, DenoiserConfig, Guided, with_guidance
from fastdiff.generate import Sampling, generate
from fastdiff.schedule import CosineSchedule, KarrasSchedule, LinearBetaSchedule
from fastdiff.unet import UNet, UNetConfig

MEAN, STD = 0.4, 0.3  # of the data: every pixel is MEAN + STD·normal
COSINE = CosineSchedule()


def full(batch, angle):
    return torch.full((batch,), angle, dtype=torch.float64)


def noise(batch, shape=(1, 4, 4), seed=0, dtype=torch.float64):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def variance(angle):
    """Of a noisy pixel: z ~ N(cos φ·MEAN, cos²φ·STD² + sin²φ)."""
    return (torch.cos(angle) * STD).square() + torch.sin(angle).square()


def expected_image(z, angle):
    """E[x | z] of jointly normal x and z."""
    cos = torch.cos(angle)
    return MEAN + wide(cos * STD**2 / variance(angle)) * (z - wide(cos) * MEAN)


def expected_noise(z, angle):
    """E[ε | z] of jointly normal ε and z."""
    return wide(torch.sin(angle) / variance(angle)) * (z - wide(torch.cos(angle)) * MEAN)


def gaussian(z, angle, label=None, guidance=None):
    """The exact velocity E[v | z]."""
    angle = angle.double()
    return wide(torch.cos(angle)) * expected_noise(z, angle) - wide(torch.sin(angle)) * expected_image(z, angle)


def exact_flow(z, start, end):
    """dz/dφ = E[v | z] is solved by z = cos φ·MEAN + √variance(φ)·u with u constant.

    Its derivative: −sin φ·MEAN + sin φ·cos φ·(1 − STD²)/√variance·u, which is E[v | z].
    """
    start, end = torch.as_tensor(start, dtype=torch.float64), torch.as_tensor(end, dtype=torch.float64)
    unit = (z - torch.cos(start) * MEAN) / variance(start).sqrt()
    return torch.cos(end) * MEAN + variance(end).sqrt() * unit


def test_the_closed_form_of_the_flow_solves_its_equation():
    z, angle, small = noise(2), 0.8, 1e-5
    slope = (exact_flow(z, angle, angle + small) - exact_flow(z, angle, angle - small)) / (2 * small)
    torch.testing.assert_close(slope, gaussian(z, full(2, angle)), rtol=1e-8, atol=1e-8)


# --- ddim ---


def test_ddim_converges_at_first_order_to_the_exact_flow():
    z = noise(8)
    exact = exact_flow(z, COSINE.angle(1.0), 0.0)
    steps = (32, 64, 128, 256)
    errors = [
        (samplers.ddim(gaussian, z, None, None, count, schedule=COSINE) - exact).abs().max().item() for count in steps
    ]
    ratios = [coarse / fine for coarse, fine in pairwise(errors)]
    assert all(1.85 < ratio < 2.15 for ratio in ratios), (errors, ratios)
    assert errors[-1] < 0.02


@pytest.mark.parametrize("schedule", [LinearBetaSchedule(), KarrasSchedule()], ids=lambda s: type(s).__name__)
def test_ddim_approaches_the_exact_flow_on_every_schedule(schedule):
    z = noise(8)
    exact = exact_flow(z, schedule.angle(1.0), 0.0)
    coarse, fine = (
        (samplers.ddim(gaussian, z, None, None, count, schedule=schedule) - exact).abs().max() for count in (128, 512)
    )
    assert fine < coarse / 3
    assert fine < 0.02


@pytest.mark.parametrize("schedule", [COSINE, LinearBetaSchedule(), KarrasSchedule()], ids=lambda s: type(s).__name__)
def test_one_step_gives_the_expected_image(schedule):
    z = noise(4)
    image = samplers.ddim(gaussian, z, None, None, 1, schedule=schedule)
    torch.testing.assert_close(image, expected_image(z, full(4, schedule.angle(1.0))), rtol=1e-10, atol=1e-10)


def test_ddim_is_the_classical_formula_step_by_step():
    """[GD] eq. 4 with x̂ and ε̂, over the times i/N, and the last step to the image."""
    steps, z = 5, noise(3)
    current, seen = z.clone(), []
    for i in range(steps, 0, -1):
        angle = full(3, COSINE.angle(i / steps))
        x = expected_image(current, angle)
        eps = (current - wide(torch.cos(angle)) * x) / wide(torch.sin(angle))
        end = COSINE.angle((i - 1) / steps) if i > 1 else 0.0
        current = math.cos(end) * x + math.sin(end) * eps
        seen.append((i, current))
    reported = []
    result = samplers.ddim(
        gaussian, z, None, None, steps, schedule=COSINE, on_step=lambda i, here: reported.append((i, here.clone()))
    )
    assert [i for i, _ in reported] == [5, 4, 3, 2, 1]
    for (_, mine), (_, theirs) in zip(seen, reported, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-10, atol=1e-10)
    assert torch.equal(reported[-1][1], result)


def test_the_model_is_asked_once_a_step_at_the_angle_of_the_step():
    asked = []

    def model(z, angle, label, guidance):
        asked.append((angle.tolist(), label, guidance))
        return torch.zeros_like(z)

    label = torch.tensor([3, 4])
    samplers.ddim(model, noise(2), label, 1.5, 4, schedule=COSINE)
    assert [angle for angle, _, _ in asked] == [[pytest.approx(COSINE.angle(i / 4))] * 2 for i in (4, 3, 2, 1)]
    for _, here, guidance in asked:
        assert here is label
        assert guidance.tolist() == [1.5, 1.5]


@pytest.mark.parametrize("limit", [1.0, 0.25])
def test_clip_limits_the_image_in_every_step(limit):
    def wild(z, angle, label, guidance):  # its image estimate is 5·sign(z): far outside
        return (wide(torch.cos(angle)) * z - 5 * z.sign()) / wide(torch.sin(angle))

    z, steps, current = noise(3), 4, noise(3)
    for i in range(steps, 0, -1):
        start, end = COSINE.angle(i / steps), COSINE.angle((i - 1) / steps) if i > 1 else 0.0
        x = limit * current.sign()
        current = math.cos(end) * x + math.sin(end) * (current - math.cos(start) * x) / math.sin(start)
    result = samplers.ddim(wild, z, None, None, steps, schedule=COSINE, clip=limit)
    torch.testing.assert_close(result, current, rtol=1e-10, atol=1e-10)
    assert result.abs().max() <= limit
    assert samplers.ddim(wild, z, None, None, steps, schedule=COSINE).abs().min() > 4


def test_a_wide_clip_changes_nothing():
    z = noise(3)
    free, clipped = (samplers.ddim(gaussian, z, None, None, 7, schedule=COSINE, clip=c) for c in (None, 1e6))
    torch.testing.assert_close(free, clipped, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [0, -1])
def test_less_than_one_step_is_a_value_error(steps):
    with pytest.raises(ValueError, match=str(steps)):
        samplers.ddim(gaussian, noise(1), None, None, steps, schedule=COSINE)


def test_images_are_float32_for_float32_noise():
    z = noise(2, dtype=torch.float32)

    def single(z, angle, label, guidance):
        return gaussian(z, angle).float()

    assert samplers.ddim(single, z, None, None, 3, schedule=COSINE).dtype == torch.float32


# --- guidance ---

CLASSES = 3
LABELS = torch.tensor([0, 2, 1, 1])


class Stub(nn.Module):
    """A velocity network of a few numbers, which counts its rows and notes its calls."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.classes = classes
        self.table = nn.Parameter(torch.randn(classes + 1, generator=generator, dtype=torch.float64))
        self.calls = []

    @property
    def rows(self):
        return sum(len(label) for label in self.calls)

    def forward(self, z, time, label, guidance):
        label = torch.full((len(z),), self.classes) if label is None else label
        self.calls.append(label)
        return torch.tanh(z) * wide(1 + time.double()) + wide(self.table[label])


def stub_denoiser(classes=CLASSES, parameterization="v", network=None, **fields):
    config = DenoiserConfig(
        unet=UNetConfig(image_size=(4, 4), image_channels=1, num_classes=classes),
        parameterization=parameterization,
        **fields,
    )
    return Denoiser(config, network=Stub(classes) if network is None else network)


@pytest.mark.parametrize("parameterization", rotation.PARAMETERIZATIONS)
def test_guided_extrapolates_from_the_unconditional_velocity(parameterization):
    denoiser = stub_denoiser(parameterization=parameterization)
    z, angle = noise(4), torch.tensor([0.2, 0.7, 1.1, 1.5], dtype=torch.float64)
    w = torch.tensor([1 / 3, 0.0, 2.0, 0.1])  # in float32, but no digit may be lost of 1 + w
    conditional, unconditional = denoiser(z, angle, LABELS), denoiser(z, angle)
    expected = wide(1 + w.double()) * conditional - wide(w.double()) * unconditional
    torch.testing.assert_close(Guided(denoiser)(z, angle, LABELS, w), expected, rtol=1e-11, atol=1e-11)


def test_no_label_is_the_null_class():
    denoiser = stub_denoiser()
    z, angle = noise(4), full(4, 0.5)
    assert torch.equal(denoiser(z, angle), denoiser(z, angle, torch.full((4,), CLASSES)))
    assert not torch.equal(denoiser(z, angle), denoiser(z, angle, torch.full((4,), 0)))


@pytest.mark.parametrize("guidance", [None, torch.zeros(4)], ids=["None", "zeros"])
def test_guided_without_guidance_is_one_call_on_the_batch(guidance):
    denoiser = stub_denoiser()
    z, angle = noise(4), full(4, 0.5)
    result = Guided(denoiser)(z, angle, LABELS, guidance)
    assert [len(label) for label in denoiser.network.calls] == [4]
    assert denoiser.network_rows == 4
    assert torch.equal(result, denoiser(z, angle, LABELS))


def test_guided_with_guidance_is_one_call_on_both_halves():
    denoiser = stub_denoiser()
    Guided(denoiser)(noise(4), full(4, 0.5), LABELS, torch.tensor([0.0, 0.0, 0.0, 1.0]))
    (labels,) = denoiser.network.calls
    assert sorted(labels.tolist()) == sorted([*LABELS.tolist(), *[CLASSES] * 4])
    assert denoiser.network_rows == Guided(denoiser).network_rows == 8


@pytest.mark.parametrize(
    ("guidance", "calls_an_image"),
    [(None, 1), (0.0, 1), (0, 1), (torch.zeros(4), 1), (2.0, 2), (torch.tensor([0.0, 1.0, 2.0, 4.0]), 2)],
    ids=str,
)
def test_ddim_takes_every_form_of_guidance_and_calls_the_network_once_a_step(guidance, calls_an_image):
    denoiser, reference = stub_denoiser(), stub_denoiser()
    z, steps = noise(4), 3
    result = samplers.ddim(Guided(denoiser), z, LABELS, guidance, steps, schedule=COSINE)
    assert len(denoiser.network.calls) == steps
    assert denoiser.network.rows == denoiser.network_rows == steps * 4 * calls_an_image

    w = torch.as_tensor(0 if guidance is None else guidance, dtype=torch.float64).expand(4)

    def written_out(z, angle, label, ignored):
        return wide(1 + w) * reference(z, angle, label) - wide(w) * reference(z, angle)

    expected = samplers.ddim(written_out, z, LABELS, None, steps, schedule=COSINE)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def test_a_number_and_a_tensor_of_it_guide_alike():
    z = noise(4)
    number, tensor = (
        samplers.ddim(Guided(stub_denoiser()), z, LABELS, w, 3, schedule=COSINE, clip=1.0)
        for w in (1.5, torch.full((4,), 1.5, dtype=torch.float64))
    )
    assert torch.equal(number, tensor)


def test_an_unconditional_model_cannot_be_guided():
    with pytest.raises(ValueError, match="class-conditional"):
        Guided(stub_denoiser(classes=0))


def test_models_are_wrapped_for_guidance_only_where_they_need_it():
    conditional, unconditional = stub_denoiser(), stub_denoiser(classes=0)
    knowing = stub_denoiser(guidance_range=(0.0, 4.0))
    assert isinstance(with_guidance(conditional), Guided)
    assert with_guidance(unconditional) is unconditional
    assert with_guidance(knowing) is knowing


# --- parameterizations ---


class GaussianNetwork(nn.Module):
    """What a perfect network of each parameterization puts out for Gaussian data; it is told the angle in float64."""

    def __init__(self, parameterization, angle):
        super().__init__()
        self.parameterization, self.angle, self.time = parameterization, angle, None

    def forward(self, z, time, label, guidance):
        self.time = time
        angle = self.angle
        if self.parameterization == "v":
            return gaussian(z, angle)
        if self.parameterization == "eps":
            return expected_noise(z, angle)
        if self.parameterization == "x":
            return expected_image(z, angle)
        sigma = torch.tan(angle)  # here z is c_in·(x + σ·n)
        noisy = z * wide((sigma**2 + 0.25).sqrt())
        denoised = MEAN + wide(STD**2 / (STD**2 + sigma**2)) * (noisy - MEAN)
        c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
        return (denoised - wide(c_skip) * noisy) / wide(c_out)


@pytest.mark.parametrize("parameterization", rotation.PARAMETERIZATIONS)
def test_every_parameterization_of_the_exact_denoiser_has_its_velocity(parameterization):
    angle = torch.tensor([0.01, 0.3, 1.0, 1.5, math.atan(80)], dtype=torch.float64)
    network = GaussianNetwork(parameterization, angle)
    z = noise(5)
    result = stub_denoiser(classes=0, parameterization=parameterization, network=network)(z, angle)
    torch.testing.assert_close(result, gaussian(z, angle), rtol=1e-9, atol=1e-9)
    assert network.time.dtype == torch.float32
    expected_time = torch.log(torch.tan(angle)) / 4 if parameterization == "edm" else angle / (math.pi / 2)
    torch.testing.assert_close(network.time.double(), expected_time, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parameterization", rotation.PARAMETERIZATIONS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_every_parameterization_samples_the_same_images(parameterization, clip):
    """The raw output is fused into the step, so this is another path than the velocity's."""
    steps, schedule, z = 4, KarrasSchedule(), noise(3)
    network = GaussianNetwork(parameterization, full(3, schedule.angle(1.0)))

    def next_angle(i, _):
        network.angle = full(3, schedule.angle((i - 1) / steps))

    denoiser = stub_denoiser(classes=0, parameterization=parameterization, network=network)
    result = samplers.ddim(denoiser, z, None, None, steps, schedule=schedule, clip=clip, on_step=next_angle)
    expected = samplers.ddim(gaussian, z, None, None, steps, schedule=schedule, clip=clip)
    torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-8)


# --- beside the kernels' own steps ---


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", ["ddim", "stochastic"])
def test_the_kernels_steps_are_the_samplers(name, clip):
    """`kernels.guided_step` and `stochastic_step` follow the same rules, from velocities instead of a model."""
    steps, w, seen = 4, torch.tensor([0.0, 1.0, 2.5]), {}
    key = {"seed": 3, "sample_ids": torch.tensor([4, 0, 9])}
    z = kernels.randn((3, 1, 4, 4), seed=0, sample_ids=torch.arange(3), step=0, device="cpu").double()
    inside, outside = torch.tanh, lambda z: 0.4 * z - 0.1

    def guided(z, angle, label, guidance):
        return (1 + wide(guidance)) * inside(z) - wide(guidance) * outside(z)

    sampler = getattr(samplers, name)
    last = sampler(guided, z, None, w, steps, schedule=COSINE, clip=clip, on_step=seen.__setitem__, **key)
    angles = [full(3, COSINE.angle(i / steps)) if i else full(3, 0.0) for i in range(steps + 1)]
    for i in range(steps, 0, -1):
        start, far, to = (angles[max(at, 0)] for at in (i, i - 2, i - 1))
        if name == "stochastic":
            noise = key | {"step": i}
            z = kernels.stochastic_step(z, inside(z), outside(z), w, start, far, to, clip=clip, **noise)
        else:
            z = kernels.guided_step(z, inside(z), outside(z), w, start, to, clip=clip)
        torch.testing.assert_close(z, seen[i], rtol=0, atol=1e-10)
    assert torch.equal(seen[1], last) and last.std() > 0.1


# --- generate ---

TINY = UNetConfig(
    image_size=(8, 8),
    image_channels=1,
    num_classes=4,
    channels=16,
    channel_mult=(1, 1),
    blocks=1,
    attention_resolutions=(4,),
    head_width=8,
)


def tiny(config=TINY, **fields):
    """A small U-Net whose every weight matters: freshly made ones return zero."""
    torch.manual_seed(0)
    denoiser = Denoiser(DenoiserConfig(unet=config, **fields)).eval()
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.15)
    return denoiser


@pytest.fixture(scope="module")
def model():
    return with_guidance(tiny())


def images_of(model, labels=7, noise_ids=None, **options):
    return torch.cat(list(generate(model, labels, Sampling(**{"steps": 3, "seed": 5} | options), noise_ids=noise_ids)))


@pytest.mark.parametrize("guidance", [None, 1.5, torch.linspace(0, 3, 7)], ids=["unguided", "number", "tensor"])
def test_an_image_does_not_depend_on_the_chunk_it_is_made_in(model, guidance):
    together = images_of(model, guidance=guidance, batch_size=64)
    assert together.shape == (7, 1, 8, 8)
    assert together.std() > 0.1
    for batch_size in (1, 3):
        apart = images_of(model, guidance=guidance, batch_size=batch_size)
        torch.testing.assert_close(apart, together, rtol=0, atol=1e-5)


def test_images_differ_between_seeds_ids_labels_and_guidance(model):
    base = images_of(model)
    assert torch.equal(base, images_of(model))
    for change in ({"seed": 6}, {"guidance": 2.0}, {"labels": (torch.arange(7) + 1) % 4}):
        changed = images_of(model, **change)
        assert ((base - changed).abs().amax(dim=(1, 2, 3)) > 1e-3).all(), change


def test_labels_take_turns_by_default(model):
    torch.testing.assert_close(images_of(model), images_of(model, labels=torch.tensor([0, 1, 2, 3, 0, 1, 2])))


def test_noise_ids_pick_the_noise(model):
    labels = torch.zeros(7, dtype=torch.int64)
    base = images_of(model, labels=labels)
    torch.testing.assert_close(images_of(model, labels=labels, noise_ids=torch.arange(7)), base)
    order = torch.tensor([6, 2, 0])
    some = images_of(model, labels=labels[:3], noise_ids=order, batch_size=2)
    torch.testing.assert_close(some, base[order], rtol=0, atol=1e-5)


def test_generate_samples_from_the_documented_noise(model):
    start = kernels.randn((7, 1, 8, 8), seed=5, sample_ids=torch.arange(7), step=0, device="cpu")
    with torch.no_grad():
        expected = samplers.ddim(model, start, torch.arange(7) % 4, 1.0, 3, schedule=COSINE, clip=1.0)
    torch.testing.assert_close(images_of(model, guidance=1.0), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [None, 3])
def test_clip_is_on_unless_switched_off(steps):
    denoiser = tiny(guidance_range=(0.0, 4.0), steps=steps)
    nn.init.constant_(denoiser.network.conv_out.bias, -3.0)  # a velocity of −3 is an image of +3
    default, on, off = images_of(denoiser), images_of(denoiser, clip=True), images_of(denoiser, clip=False)
    assert torch.equal(default, on)
    assert default.abs().max() <= 1 < off.abs().max()


@pytest.mark.parametrize(
    ("config", "steps", "sampler"),
    [
        ({"guidance_range": (0.0, 4.0), "steps": 3}, 3, "ddim"),
        ({"guidance_range": (0.0, 4.0), "steps": 4, "sampler": "stochastic"}, 4, "stochastic"),
        (
            {"guidance_range": (0.0, 4.0), "kind": "sid", "steps": 1, "sampler": "one_step", "sigma_init": 2.5},
            1,
            "one_step",
        ),
        ({}, 64, "ddim"),
        ({"kind": "stage1", "guidance_range": (0.0, 4.0)}, 64, "ddim"),
    ],
    ids=["deterministic", "stochastic", "SiD", "teacher", "stage 1"],
)
def test_a_model_is_sampled_as_it_was_trained(config, steps, sampler):
    """Without a word about it; once, all were taken through ddim, and a bare teacher ignored its guidance."""
    denoiser, how = tiny(**config), Sampling(guidance=1.5, seed=5)
    found = torch.cat(list(generate(denoiser, 4, how)))
    calls = denoiser.network_rows
    explicit = replace(how, steps=steps, sampler=sampler)
    expected = torch.cat(list(generate(with_guidance(denoiser), 4, explicit)))
    assert torch.equal(found, expected) and calls == 4 * steps * (2 if config == {} else 1)
    if config == {}:
        assert (found - torch.cat(list(generate(denoiser, 4, replace(how, guidance=None))))).abs().max() > 1e-3


def test_an_encoder_generates_nothing():
    with pytest.raises(ValueError, match="'encode' is none of ddim"):
        next(generate(tiny(kind="encoder", sampler="encode", steps=4, guidance_range=(0.0, 4.0)), 1, Sampling()))


def test_generate_makes_images_only_when_asked(model):
    chunks = generate(model, 7, Sampling(steps=2, batch_size=3))
    assert inspect.isgenerator(chunks)
    before = model.network_rows
    sizes, rows = [], []
    for chunk in chunks:
        sizes.append(len(chunk))
        rows.append(model.network_rows - before)
        assert chunk.dtype == torch.float32
        assert not chunk.requires_grad
        assert torch.is_grad_enabled()
    assert sizes == [3, 3, 1]
    assert rows == [6, 12, 14]


def test_an_unconditional_model_generates():
    assert images_of(with_guidance(tiny(replace(TINY, num_classes=0)))).shape == (7, 1, 8, 8)


def test_a_guided_step_runs_without_data():
    """On the meta device nothing may look at a value: no branch depends on data, so it can be captured or exported."""
    guided = Guided(Denoiser(DenoiserConfig(unet=TINY), network=UNet(TINY).to("meta")))
    z, label, w = (torch.empty(*shape, device="meta") for shape in ((2, 1, 8, 8), (2,), (2,)))
    image = samplers.ddim(guided, z, label.long(), w, 1, schedule=COSINE, clip=1.0)
    assert image.device.type == "meta"
    assert image.shape == (2, 1, 8, 8)
    assert image.dtype == torch.float32
    assert guided.network_rows == 4


def test_autocast_does_not_reach_the_caller(model):
    for images in generate(model, 4, Sampling(steps=1, batch_size=2, precision="bf16")):
        assert not torch.is_autocast_enabled("cpu")
        assert images.dtype == torch.float32
    chunks = generate(model, 4, Sampling(steps=1, batch_size=2, precision="bf16"))
    next(chunks)
    assert not torch.is_autocast_enabled("cpu")
