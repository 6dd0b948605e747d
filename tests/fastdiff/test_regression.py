"""The losses of distillation against their definitions, computed the long way in float64 with stub networks."""

import math
from dataclasses import replace

import pytest
import torch
from common import wide
from scipy import stats
from torch import nn

import kernels
from fastdiff import rotation, samplers, streams
from fastdiff.denoiser import Denoiser, DenoiserConfig, Guided
from fastdiff.losses import regression
from fastdiff.losses.batch import GUIDANCE, TIME, Batch
from fastdiff.schedule import CosineSchedule, KarrasSchedule, LinearBetaSchedule
from fastdiff.unet import UNetConfig

CLASSES, BATCH, SHAPE = 3, 12, (2, 4, 4)
SCHEDULES = [CosineSchedule(), LinearBetaSchedule(), KarrasSchedule()]
every_schedule = pytest.mark.parametrize("sched", SCHEDULES, ids=lambda s: type(s).__name__)
every_parameterization = pytest.mark.parametrize("parameterization", rotation.PARAMETERIZATIONS)
every_weight = pytest.mark.parametrize("weight", rotation.LOSS_WEIGHTS)


class Network(nn.Module):
    """A float64 network that depends on the image (all channels), time, label and guidance."""

    def __init__(self, seed=0, classes=CLASSES):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.classes = classes
        self.mix = nn.Parameter(torch.randn(SHAPE[0], SHAPE[0], generator=generator, dtype=torch.float64))
        self.table = nn.Parameter(torch.randn(classes + 1, generator=generator, dtype=torch.float64))
        self.strength = nn.Parameter(torch.randn(1, generator=generator, dtype=torch.float64))

    def forward(self, z, time, label, guidance):
        label = torch.full((len(z),), self.classes) if label is None else label
        w = torch.zeros(len(z)) if guidance is None else guidance
        mixed = torch.einsum("dc,bchw->bdhw", self.mix, z)
        return torch.tanh(mixed) * wide(1 + time) + wide(self.table[label]) + wide(self.strength * w)


def denoiser(network=None, *, parameterization="v", schedule=SCHEDULES[0], classes=CLASSES, seed=0):
    config = DenoiserConfig(
        unet=UNetConfig(image_size=SHAPE[1:], image_channels=SHAPE[0], num_classes=classes),
        schedule=schedule,
        parameterization=parameterization,
    )
    return Denoiser(config, network=Network(seed, classes) if network is None else network)


def batch(size=BATCH, *, labelled=True, seed=17, first=1000):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(size, *SHAPE, generator=generator, dtype=torch.float64) * 2 - 1
    label = torch.randint(CLASSES, (size,), generator=generator) if labelled else None
    return Batch(x, label, torch.arange(first, first + size), seed)


def part(whole, rows):
    label = None if whole.label is None else whole.label[rows]
    return replace(whole, x=whole.x[rows], label=label, sample_ids=whole.sample_ids[rows])


# --- the long way ---


def long_velocity(model, z, angle, label, w=None):
    """v from a denoiser's network by the definition of its parameterization: by way of x̂ and ε̂."""
    cos, sin = wide(torch.cos(angle)), wide(torch.sin(angle))
    name = model.config.parameterization
    if name == "edm":
        sigma = torch.tan(angle)
        noisy = z / cos
        time = (torch.log(sigma) / 4).float()
        output = model.network(noisy / wide((sigma**2 + 0.25).sqrt()), time, label, w)
        x = wide(0.25 / (sigma**2 + 0.25)) * noisy + wide(sigma * 0.5 / (sigma**2 + 0.25).sqrt()) * output
        return cos * (z - cos * x) / sin - sin * x
    output = model.network(z, (angle / (math.pi / 2)).float(), label, w)
    if name == "v":
        return output
    x, eps = (output, (z - cos * output) / sin) if name == "x" else ((z - sin * output) / cos, output)
    return cos * eps - sin * x


def long_guided(model, z, angle, label, w):
    conditional, unconditional = long_velocity(model, z, angle, label), long_velocity(model, z, angle, None)
    return (1 + wide(w)) * conditional - wide(w) * unconditional


def long_loss(target, prediction, z, angle, weight):
    """The error that the weight's name stands for, in x̂ and ε̂."""
    cos, sin = wide(torch.cos(angle)), wide(torch.sin(angle))
    in_x = ((cos * z - sin * target) - (cos * z - sin * prediction)).square().flatten(1).mean(1)
    in_eps = ((sin * z + cos * target) - (sin * z + cos * prediction)).square().flatten(1).mean(1)
    return {
        "v": in_x + in_eps,
        "snr": in_eps,
        "snr_trunc": torch.maximum(in_x, in_eps),
        "constant": in_x,
        "edm": in_eps + 4 * in_x,
    }[weight]


def long_noised(data, angle):
    eps = kernels.randn(data.x.shape, seed=data.seed, sample_ids=data.sample_ids, step=streams.NOISE, device="cpu")
    return wide(torch.cos(angle)) * data.x + wide(torch.sin(angle)) * eps, eps.double()


def assert_same(loss, expected):
    assert loss.shape == expected.shape
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-10)


# --- teacher ---


@every_weight
@every_parameterization
@every_schedule
def test_teacher_loss_is_the_denoising_error(sched, parameterization, weight):
    model, data = denoiser(parameterization=parameterization, schedule=sched), batch()
    angle = sched.angle(data.uniform(TIME))
    z, eps = long_noised(data, angle)
    target = wide(torch.cos(angle)) * eps - wide(torch.sin(angle)) * data.x
    draw = kernels.rand((BATCH,), seed=data.seed, sample_ids=data.sample_ids, step=streams.LABEL_DROP, device="cpu")
    label = torch.tensor([CLASSES if u < 0.3 else k for u, k in zip(draw.tolist(), data.label.tolist(), strict=True)])
    assert 0 < (label == CLASSES).sum() < BATCH
    expected = long_loss(target, long_velocity(model, z, angle, label), z, angle, weight)
    assert_same(regression.teacher(model, data, label_drop=0.3, weight=weight), expected)


def test_teacher_loss_defaults_to_the_noise_error_and_a_tenth_of_dropped_labels():
    model, data = denoiser(), batch(200)
    assert torch.equal(regression.teacher(model, data), regression.teacher(model, data, label_drop=0.1, weight="snr"))
    assert not torch.equal(regression.teacher(model, data), regression.teacher(model, data, label_drop=0.0))


class Fixed(nn.Module):
    """Puts out what it was given, whatever it is asked."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, z, time, label, guidance):
        return self.output


def test_teacher_loss_is_zero_for_a_network_that_knows_the_noise():
    data = batch()
    _, eps = long_noised(data, data.uniform(TIME))
    loss = regression.teacher(denoiser(Fixed(eps), parameterization="eps"), data)
    torch.testing.assert_close(loss, torch.zeros(BATCH, dtype=torch.float64), rtol=0, atol=1e-15)


# --- stage 1 ---

RANGE = (0.0, 4.0)


@every_weight
@every_parameterization
@every_schedule
def test_stage1_loss_is_the_distance_to_the_guided_teacher(sched, parameterization, weight):
    """The student's parameterization varies; the teacher's stays."""
    student = denoiser(parameterization=parameterization, schedule=sched, seed=1)
    teacher, data = denoiser(parameterization="x", schedule=sched), batch()
    angle, w = sched.angle(data.uniform(TIME)), data.guidance(RANGE)
    z, _ = long_noised(data, angle)
    expected = long_loss(
        long_guided(teacher, z, angle, data.label, w), long_velocity(student, z, angle, data.label, w), z, angle, weight
    )
    assert_same(regression.stage1(student, Guided(teacher), data, guidance_range=RANGE, weight=weight), expected)


@every_parameterization
def test_stage1_takes_a_teacher_of_every_parameterization(parameterization):
    student, teacher, data = denoiser(seed=1), denoiser(parameterization=parameterization), batch()
    angle, w = student.schedule.angle(data.uniform(TIME)), data.guidance((1.0, 2.0))
    z, _ = long_noised(data, angle)
    target = long_guided(teacher, z, angle, data.label, w)
    expected = long_loss(target, long_velocity(student, z, angle, data.label, w), z, angle, "snr")
    assert_same(regression.stage1(student, Guided(teacher), data, guidance_range=(1.0, 2.0)), expected)


@every_weight
def test_two_outputs_are_compared_as_the_velocity_that_they_make(weight):
    class Both(Network):
        def forward(self, *inputs):
            return torch.cat([super().forward(*inputs), self.mix.sum() * super().forward(*inputs).square()], dim=1)

    shape = replace(denoiser().config.unet, outputs=2)
    config = replace(denoiser().config, unet=shape, parameterization="eps-x", guidance_range=RANGE)
    student, teacher, data = Denoiser(config, Both(1)), denoiser(parameterization="eps"), batch()
    angle, w = student.schedule.angle(data.uniform(TIME)), data.guidance(RANGE)
    z, _ = long_noised(data, angle)
    eps, x = student.network(z, student.time(angle).float(), data.label, w).chunk(2, dim=1)
    velocity = wide(torch.cos(angle)) * eps - wide(torch.sin(angle)) * x
    expected = long_loss(long_guided(teacher, z, angle, data.label, w), velocity, z, angle, weight)
    found = regression.stage1(student, Guided(teacher), data, guidance_range=RANGE, weight=weight)
    assert_same(found, expected)
    one, other = (
        torch.autograd.grad(loss.sum(), student.parameters(), retain_graph=True) for loss in (found, expected)
    )
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)


def test_two_steps_of_a_limited_teacher():
    """Both steps take the limited x̂; where it lies within the limit, nothing changes."""
    sched = LinearBetaSchedule()
    student, data = denoiser(schedule=sched, seed=1), batch()
    teacher = denoiser(parameterization="eps", schedule=sched)
    how = {"steps": 8, "guidance_range": None, "weight": "v"}

    def limited(z, angle, label, w):
        x = rotation.x_from_velocity(z, teacher(z, angle, label, w), angle).clamp(-1, 1)
        return rotation.velocity_from_x(z, x, angle)

    free = regression.stage2(student, teacher, data, **how)
    found = regression.stage2(student, teacher, data, clip=1.0, **how)
    assert_same(found, regression.stage2(student, limited, data, **how))
    assert not torch.allclose(found, free)
    assert_same(regression.stage2(student, teacher, data, clip=1e6, **how), free)


class GuidedInside(nn.Module):
    """A student that has learned its teacher by heart."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, z, time, label, guidance):
        conditional, unconditional = (self.network(z, time, k, None) for k in (label, None))
        return (1 + wide(guidance)) * conditional - wide(guidance) * unconditional


@every_parameterization
def test_stage1_loss_is_zero_for_a_student_that_equals_the_guided_teacher(parameterization):
    teacher, data = denoiser(parameterization=parameterization), batch()
    student = denoiser(GuidedInside(teacher.network), parameterization=parameterization)
    loss = regression.stage1(student, Guided(teacher), data, guidance_range=RANGE, weight="snr_trunc")
    scale = regression.stage1(student, Guided(denoiser(seed=3)), data, guidance_range=RANGE, weight="snr_trunc")
    assert scale.min() > 1e-4
    assert loss.max() < 1e-18


# --- stage 2 ---


def long_index(data, steps):
    return torch.floor(data.uniform(TIME) * steps).long() + 1


def two_teacher_steps(teacher_velocity, z, a, m, e):
    """Two DDIM steps in x̂ and ε̂, and the velocity that lands there: z_e = cos e·x + sin e·ε for one (x, ε)."""
    for start, end in ((a, m), (m, e)):
        v = teacher_velocity(z, start)
        x = wide(torch.cos(start)) * z - wide(torch.sin(start)) * v
        eps = wide(torch.sin(start)) * z + wide(torch.cos(start)) * v
        z = wide(torch.cos(end)) * x + wide(torch.sin(end)) * eps
    return z


def solve_velocity(z, landing, a, e):
    """v of the pair (x, ε) with cos a·x + sin a·ε = z and cos e·x + sin e·ε = landing: two equations, solved."""
    ends = torch.stack([torch.stack([torch.cos(t), torch.sin(t)], -1) for t in (a, e)], 1)  # (B, 2, 2)
    known = torch.stack([z.flatten(1), landing.flatten(1)], 1)  # (B, 2, pixels)
    x, eps = torch.linalg.solve(ends, known).unbind(1)
    return (torch.cos(a)[:, None] * eps - torch.sin(a)[:, None] * x).view_as(z)


def long_stage2(student, teacher_velocity, data, steps, w, weight):
    sched, index = student.schedule, long_index(data, steps)
    a, m, e = (
        torch.tensor([sched.angle((i - back) / steps) for i in index.tolist()], dtype=torch.float64)
        for back in (0, 0.5, 1)
    )
    e[index == 1] = 0.0
    z, _ = long_noised(data, a)
    target = solve_velocity(z, two_teacher_steps(teacher_velocity, z, a, m, e), a, e)
    return long_loss(target, long_velocity(student, z, a, data.label, w), z, a, weight)


@every_weight
@every_parameterization
@pytest.mark.parametrize("steps", [1, 2, 4, 32])
def test_stage2_loss_is_the_distance_to_two_teacher_steps(steps, parameterization, weight):
    student, teacher, data = denoiser(parameterization=parameterization, seed=1), denoiser(), batch()
    w = data.guidance(RANGE)
    expected = long_stage2(
        student, lambda z, angle: long_guided(teacher, z, angle, data.label, w), data, steps, w, weight
    )
    loss = regression.stage2(student, Guided(teacher), data, steps=steps, guidance_range=RANGE, weight=weight)
    assert_same(loss, expected)


@every_schedule
@every_parameterization
def test_stage2_gives_the_strength_to_teacher_and_student_alike(parameterization, sched):
    """The teacher of the second round is a student itself: no Guided around it."""
    student = denoiser(schedule=sched, seed=1)
    teacher, data = denoiser(parameterization=parameterization, schedule=sched), batch()
    w = data.guidance(RANGE)
    expected = long_stage2(
        student, lambda z, angle: long_velocity(teacher, z, angle, data.label, w), data, 8, w, "snr_trunc"
    )
    assert_same(regression.stage2(student, teacher, data, steps=8, guidance_range=RANGE), expected)


def test_stage2_takes_any_callable_as_its_teacher():
    teacher, student, data = denoiser(), denoiser(seed=1), batch()
    plain = regression.stage2(student, lambda *given: teacher(*given), data, steps=4, guidance_range=RANGE)
    assert_same(plain, regression.stage2(student, teacher, data, steps=4, guidance_range=RANGE))


class OneImage(nn.Module):
    """The exact denoiser of a data set with one image a class. Its flow is linear: any number of steps are one."""

    def __init__(self):
        super().__init__()
        self.images = nn.Parameter(torch.randn(CLASSES + 1, *SHAPE, dtype=torch.float64))

    def forward(self, z, time, label, guidance):
        return self.images[label]


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 16, 1024])
def test_stage2_loss_is_zero_where_two_steps_are_one(sched, steps):
    model = denoiser(OneImage(), parameterization="x", schedule=sched)
    data = batch(64)
    loss = regression.stage2(model, model, data, steps=steps, guidance_range=None, weight="v")
    other = regression.stage2(
        denoiser(schedule=sched, seed=1), model, data, steps=steps, guidance_range=None, weight="v"
    )
    assert other.min() > 1e-2
    assert loss.max() < 1e-12


def test_stage2_loss_is_not_zero_where_the_flow_is_curved():
    model = denoiser()
    assert regression.stage2(model, model, batch(), steps=4, guidance_range=None).min() > 1e-5


def test_a_student_with_zero_stage2_loss_samples_like_its_teacher_in_half_the_steps():
    """The target at work: sampling with it in N steps follows the teacher's 2N steps, to the end."""
    teacher, steps, sched = denoiser(), 4, SCHEDULES[0]
    label = torch.tensor([0, 1, 2])
    start = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def student(z, angle, label, guidance):
        i = round((angle[0].item() - sched.angle(0.0)) / (sched.angle(1.0) - sched.angle(0.0)) * steps)
        m = torch.full_like(angle, sched.angle((i - 0.5) / steps))
        e = torch.full_like(angle, sched.angle((i - 1) / steps) if i > 1 else 0.0)
        v1 = teacher(z, angle, label)
        v2 = teacher(rotation.rotate(z, v1, angle - m), m, label)
        c_z, c_1, c_2 = rotation.two_step_target(angle, m, e)
        return wide(c_z) * z + wide(c_1) * v1 + wide(c_2) * v2

    few = samplers.ddim(student, start, label, None, steps, schedule=sched)
    many = samplers.ddim(teacher, start, label, None, 2 * steps, schedule=sched)
    torch.testing.assert_close(few, many, rtol=1e-9, atol=1e-9)


def test_stage2_visits_every_step_of_the_student_equally_often():
    """i ~ U{1..N}; the network is asked at φ(i/N)."""
    asked = []

    class Listening(Network):
        def forward(self, z, time, label, guidance):
            asked.append(time)
            return super().forward(z, time, label, guidance)

    steps, size = 8, 4000
    student = denoiser(Listening())
    regression.stage2(student, lambda z, *_: torch.zeros_like(z), batch(size), steps=steps, guidance_range=None)
    grid = torch.tensor([student.schedule.angle(i / steps) / (math.pi / 2) for i in range(1, steps + 1)])
    distance, nearest = (asked[0].double()[:, None] - grid[None, :].double()).abs().min(1)
    assert distance.max() < 1e-6
    counts = torch.bincount(nearest, minlength=steps)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


# --- what all losses share ---


class Expressed(nn.Module):
    """One velocity function as a network of any parameterization; it is told the angle in float64."""

    def __init__(self, parameterization, angle):
        super().__init__()
        self.parameterization, self.angle, self.inner = parameterization, angle, Network(seed=1)

    def forward(self, z, time, label, guidance):
        cos, sin = wide(torch.cos(self.angle)), wide(torch.sin(self.angle))
        if self.parameterization == "edm":  # what comes in is c_in·x
            z = z * wide((torch.tan(self.angle) ** 2 + 0.25).sqrt()) * cos
        v = self.inner(z, self.angle, label, guidance)
        x, eps = cos * z - sin * v, sin * z + cos * v
        if self.parameterization == "edm":
            sigma = sin / cos
            return (x - 0.25 / (sigma**2 + 0.25) * z / cos) * (sigma**2 + 0.25).sqrt() / (sigma * 0.5)
        return {"v": v, "eps": eps, "x": x}[self.parameterization]


@pytest.mark.parametrize("weight", ["snr", "snr_trunc"])
def test_losses_and_gradients_do_not_depend_on_how_the_student_is_expressed(weight):
    data, teacher, sched = batch(), denoiser(), SCHEDULES[2]
    angles = {
        "teacher": sched.angle(data.uniform(TIME)),
        "stage1": sched.angle(data.uniform(TIME)),
        "stage2": sched.angle(long_index(data, 8) / 8),
    }
    results = {}
    for name in rotation.PARAMETERIZATIONS:
        for recipe, angle in angles.items():
            student = denoiser(Expressed(name, angle), parameterization=name, schedule=sched)
            if recipe == "teacher":
                loss = regression.teacher(student, data, weight=weight)
            elif recipe == "stage1":
                loss = regression.stage1(student, Guided(teacher), data, guidance_range=RANGE, weight=weight)
            else:
                loss = regression.stage2(student, teacher, data, steps=8, guidance_range=RANGE, weight=weight)
            gradients = torch.autograd.grad(loss.sum(), list(student.parameters()), allow_unused=True)
            results[name, recipe] = (loss, *(g for g in gradients if g is not None))
    for (name, recipe), values in results.items():
        for value, expected in zip(values, results["v", recipe], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-9, msg=f"{name} {recipe}")


@pytest.mark.parametrize("recipe", ["stage1", "stage2", "stage2 guided"])
def test_the_student_learns_and_the_teacher_does_not(recipe):
    student, teacher, data = denoiser(seed=1), denoiser(), batch()
    if recipe == "stage1":
        loss = regression.stage1(student, Guided(teacher), data, guidance_range=RANGE)
    else:
        wrapped = Guided(teacher) if "guided" in recipe else teacher
        loss = regression.stage2(student, wrapped, data, steps=4, guidance_range=RANGE)
    loss.sum().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in student.parameters())


def test_the_teacher_runs_without_recording_for_a_backward_pass():
    """No gradient could flow anyway; recording would only cost memory."""
    recording = []

    class Listening(Network):
        def forward(self, z, time, label, guidance):
            recording.append(torch.is_grad_enabled())
            return super().forward(z, time, label, guidance)

    student, teacher, data = denoiser(seed=1), denoiser(Listening()), batch()
    regression.stage1(student, Guided(teacher), data, guidance_range=RANGE)
    regression.stage2(student, Guided(teacher), data, steps=4, guidance_range=RANGE)
    assert recording == [False] * 3


def losses(data):
    student, teacher = denoiser(seed=1), denoiser()
    return [
        regression.teacher(student, data, label_drop=0.3),
        regression.stage1(student, Guided(teacher), data, guidance_range=RANGE),
        regression.stage2(student, Guided(teacher), data, steps=16, guidance_range=RANGE),
    ]


def test_a_samples_loss_does_not_depend_on_its_batch():
    whole = batch()
    for rows in ([0], [7, 3, 11], list(range(5, 12))):
        for together, apart in zip(losses(whole), losses(part(whole, rows)), strict=True):
            torch.testing.assert_close(apart, together[rows], rtol=1e-12, atol=1e-14)


def test_a_samples_loss_depends_on_seed_and_id():
    whole = batch()
    for change in ({"seed": 18}, {"sample_ids": whole.sample_ids + BATCH}):
        for before, after in zip(losses(whole), losses(replace(whole, **change)), strict=True):
            assert ((before - after).abs() > 1e-9).all()


def test_an_unconditional_model_trains_and_distils():
    data = batch(labelled=False)
    student, teacher = (denoiser(classes=0, seed=seed) for seed in (1, 0))
    sched = student.schedule
    angle = sched.angle(data.uniform(TIME))
    z, eps = long_noised(data, angle)
    target = wide(torch.cos(angle)) * eps - wide(torch.sin(angle)) * data.x
    expected = long_loss(target, long_velocity(student, z, angle, None), z, angle, "snr")
    assert_same(regression.teacher(student, data), expected)
    expected = long_stage2(student, lambda z, at: long_velocity(teacher, z, at, None), data, 4, None, "snr_trunc")
    assert_same(regression.stage2(student, teacher, data, steps=4, guidance_range=None), expected)


def test_unknown_weights_are_value_errors():
    model, data = denoiser(), batch()
    for call in (
        lambda: regression.teacher(model, data, weight="huber"),
        lambda: regression.stage1(model, Guided(model), data, guidance_range=RANGE, weight="huber"),
        lambda: regression.stage2(model, model, data, steps=2, guidance_range=RANGE, weight="huber"),
    ):
        with pytest.raises(ValueError, match="huber"):
            call()


# --- the randomness of a batch ---


def numbers(size, seed=0, first=0):
    return Batch(
        torch.zeros(size, 1, 1, 1), torch.zeros(size, dtype=torch.int64), torch.arange(first, first + size), seed
    )


@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("which", [TIME, GUIDANCE])
def test_times_and_strengths_are_uniform(which, seed):
    for size, first in ((10_000, 0), (1000, 10**9)):
        values = numbers(size, seed, first).uniform(which)
        assert values.dtype == torch.float64
        assert values.min() >= 0
        assert values.max() < 1
        result = stats.kstest(values.numpy(), "uniform")
        assert result.pvalue > 0.01
        assert result.statistic < 0.5 / math.sqrt(size)  # evener than independent draws, as promised


def test_time_and_strength_are_uniform_together():
    data = numbers(16_000)
    time, strength = data.uniform(TIME), data.uniform(GUIDANCE)
    cells = (time * 20).long() * 20 + (strength * 20).long()
    counts = torch.bincount(cells, minlength=400)
    assert len(counts) == 400
    assert 25 <= counts.min() <= counts.max() <= 55  # 40 expected
    assert abs(torch.corrcoef(torch.stack([time, strength]))[0, 1]) < 0.02


def test_uniforms_belong_to_seed_and_id():
    whole = numbers(100, seed=3)
    for which in (TIME, GUIDANCE):
        values = whole.uniform(which)
        rows = torch.tensor([99, 4, 50])
        assert torch.equal(part(whole, rows).uniform(which), values[rows])
        assert torch.equal(numbers(40, seed=3, first=60).uniform(which), values[60:])
        assert not torch.equal(numbers(100, seed=4).uniform(which), values)
    assert not torch.equal(whole.uniform(TIME), whole.uniform(GUIDANCE))


def test_the_noise_of_a_batch_belongs_to_seed_and_id():
    whole, rows = batch(), [5, 1]
    angle = torch.full((BATCH,), 0.7, dtype=torch.float64)
    z, eps = whole.noised(angle)
    z_part, eps_part = part(whole, rows).noised(angle[rows])
    assert torch.equal(z_part, z[rows])
    assert torch.equal(eps_part, eps[rows])
    expected, long_eps = long_noised(whole, angle)
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(eps.double(), long_eps)


def test_training_noise_is_not_the_samplers():
    """The samplers count their streams from 0; training must not show a model the very noise it starts from."""
    assert min(streams.NOISE, streams.LABEL_DROP) >= 2**31
    assert streams.NOISE != streams.LABEL_DROP


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_labels_are_dropped_at_the_given_rate(probability):
    size = 20_000
    data = replace(numbers(size), label=torch.arange(size) % 7)
    labels = data.dropped_label(probability, 7)
    dropped = labels == 7
    assert labels.dtype == torch.int64
    assert torch.equal(labels[~dropped], data.label[~dropped])
    limit = 4 * math.sqrt(probability * (1 - probability) / size)
    assert abs(dropped.double().mean() - probability) < limit
    time = data.uniform(TIME)
    assert abs(torch.corrcoef(torch.stack([dropped.double(), time]))[0, 1]) < 4 / math.sqrt(size)


def test_dropping_a_label_depends_on_seed_and_id_alone():
    size = 300
    whole = replace(numbers(size, seed=2), label=torch.arange(size) % 7)
    labels = whole.dropped_label(0.5, 7)
    rows = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:50]
    assert torch.equal(part(whole, rows).dropped_label(0.5, 7), labels[rows])
    other_labels = replace(whole, label=(whole.label + 1) % 7).dropped_label(0.5, 7)
    assert torch.equal(other_labels == 7, labels == 7)
    for change in ({"seed": 3}, {"sample_ids": whole.sample_ids + size}):
        assert not torch.equal(replace(whole, **change).dropped_label(0.5, 7) == 7, labels == 7)


def test_dropping_none_or_all_labels():
    data = replace(numbers(500), label=torch.arange(500) % 7)
    assert torch.equal(data.dropped_label(0.0, 7), data.label)
    assert (data.dropped_label(1.0, 7) == 7).all()
    assert replace(data, label=None).dropped_label(0.5, 7) is None


@pytest.mark.parametrize("limits", [(0.0, 4.0), (1.0, 1.0), (0.5, 2.0)])
def test_strengths_fill_their_range(limits):
    low, high = limits
    w = numbers(5000).guidance(limits)
    assert w.dtype == torch.float32
    assert w.shape == (5000,)
    assert low <= w.min()
    assert w.max() <= high
    if low < high:
        assert stats.kstest(w.double().numpy(), "uniform", args=(low, high - low)).pvalue > 0.01


def test_no_range_is_no_strength():
    assert numbers(3).guidance(None) is None


def test_a_clipped_teacher_steps_as_the_clipped_sampler():
    """Rotating by the clipped velocity lands where a clipped DDIM step does; x̂ = 3 everywhere is clipped to 1."""
    a, e = torch.tensor([0.3, 1.0, 1.55], dtype=torch.float64), torch.tensor([0.0, 0.4, 1.2], dtype=torch.float64)
    z = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wild = rotation.Affine((wide(torch.cos(a)) * z - 3) / wide(torch.sin(a)), torch.zeros_like(a), torch.ones_like(a))
    clipped = wild.clipped(z, a, 1.0)
    c_z, c_x = rotation.ddim(a, e)
    torch.testing.assert_close(rotation.rotate(z, clipped, a - e), wide(c_z) * z + wide(c_x) * torch.ones_like(z))


def test_stage1_learns_the_clipped_teacher():
    """The loss is that of a student that predicts the clipped velocity: zero for it, and not for the free one."""
    denoiser = Denoiser(DenoiserConfig(UNetConfig((4, 4), 1, 3, channels=8, channel_mult=(1,), middle_attention=False)))
    nn.init.constant_(denoiser.network.conv_out.bias, -3.0)  # far outside the range
    batch = Batch(torch.zeros(6, 1, 4, 4), torch.arange(6) % 3, torch.arange(6), seed=0)
    angle, w = denoiser.schedule.angle(batch.uniform(TIME)), batch.guidance((0.0, 4.0))
    z, _ = batch.noised(angle)
    wanted = Guided(denoiser).affine(z, angle, batch.label, w).clipped(z, angle, 1.0)

    class Student(Denoiser):
        def network_output(self, *arguments):
            return wanted

    student = Student(denoiser.config, nn.Identity())
    free, clipped = (
        regression.stage1(student, Guided(denoiser), batch, guidance_range=(0.0, 4.0), clip=clip)
        for clip in (None, 1.0)
    )
    assert clipped.max() < 1e-12 and free.max() > 1e-2


def test_clipping_changes_nothing_where_nothing_is_clipped():
    z = 0.3 * torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angle = torch.tensor([0.2, 0.8, 1.5], dtype=torch.float64)
    v = rotation.Affine(0.1 * z, torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(v.clipped(z, angle, 1.0), v.apply(z), rtol=1e-13, atol=1e-13)
