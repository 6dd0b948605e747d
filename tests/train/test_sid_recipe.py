"""`train.sid`: what it refuses, what an update changes, what a run leaves, and how others use its checkpoints."""

import copy
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import command_lines
import numpy as np
import pytest
import torch
from command_lines import assert_refused
from common import TINY, randomize, snapshot
from scipy import stats

import kernels
from fastdiff import checkpoint, data, metrics, samplers
from fastdiff.denoiser import Denoiser, DenoiserConfig, with_guidance
from fastdiff.errors import UserError
from fastdiff.generate import Sampling, generate
from fastdiff.losses import sid
from fastdiff.losses.batch import GUIDANCE, TIME
from fastdiff.schedule import CosineSchedule, KarrasSchedule, LinearBetaSchedule
from fastdiff.unet import UNetConfig
from train import begin, commands, encoder, loop, stage1, stage2, two_student
from train import sid as recipe
from train.updater import Updater, update_alone

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")

REAL_PREVIEW = loop.preview
CPU, META = torch.device("cpu"), torch.device("meta")
LIMITS = (0.0, 4.0)


@pytest.fixture(autouse=True)
def no_preview(monkeypatch):
    monkeypatch.setattr(loop, "preview", lambda *args, **kwargs: None)


def make_options(of, out="unused", **changes):
    fields = {"updates": 6, "batch_size": 16, "save_every": 3, "score_num": 16, "log_every": 2, "device": "cpu"}
    return recipe.Options(teacher=Path(of), out=Path(out), **(fields | changes))


def train(of, out, **changes):
    return recipe.train(make_options(of, out, **changes))


def save_model(folder, *, unet=TINY, **config):
    """A checkpoint with random weights, in which labels and guidance matter."""
    checkpoint.save(folder, randomize(Denoiser(DenoiserConfig(unet, **config)), scale=0.2))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random models of every kind, by name."""
    folder, taught = tmp_path_factory.mktemp("models"), {"unet": replace(TINY, guidance_input=True)}
    save_model(folder / "teacher")
    save_model(folder / "edm", schedule=KarrasSchedule(), parameterization="edm")
    save_model(folder / "linear", schedule=LinearBetaSchedule(), parameterization="eps")
    save_model(folder / "unconditional", unet=replace(TINY, num_classes=0))
    save_model(folder / "guided", **taught, kind="stage1", guidance_range=LIMITS)
    save_model(folder / "one strength", kind="stage1", guidance_range=(2.0, 2.0))
    save_model(folder / "stage2", **taught, kind="stage2", guidance_range=LIMITS, steps=4)
    save_model(folder / "encoder", **taught, kind="encoder", guidance_range=LIMITS, steps=4, sampler="encode")
    save_model(folder / "two_student", kind="two_student", steps=4)
    save_model(folder / "sid", kind="sid", steps=1, sampler="one_step", sigma_init=2.5, guidance_range=(0.0, 0.0))
    return folder


def learning(of, **changes):
    """(teacher, fake score's updater, generator's updater, batches) as the recipe makes them."""
    teacher = checkpoint.load(of)
    torch.manual_seed(0)
    (fake, generator), batches = recipe.learning(teacher, make_options(of, **changes))
    return teacher, fake, generator, batches


def iterate(updaters, batches, count=1):
    for _ in range(count):
        for updater in updaters:
            update_alone(updater, updaters, next(batches))


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model, state):
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def assert_same_weights(first, second, **tolerance):
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def lines_of(path):
    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# --- what is refused ----------------------------------------------------------------------------------------------

SENSELESS = [
    ({"alpha": 0.0}, "--alpha"),
    ({"alpha": -1.0}, "--alpha"),
    ({"alpha": 2.1}, "--alpha"),
    ({"alpha": math.nan}, "--alpha"),
    ({"guidance_t_max": -1.0}, "--guidance-t-max"),
    ({"guidance_t_max": math.nan}, "--guidance-t-max"),
    ({"t_max": 0.0}, "--t-max"),
    ({"t_max": 1001.0}, "--t-max"),
    ({"t_max": math.nan}, "--t-max"),
    ({"sigma_min": 0.0}, "--sigma-min"),
    ({"sigma_min": 80.0}, "--sigma-min"),
    ({"sigma_min": math.nan}, "--sigma-min"),
    ({"sigma_max": math.inf}, "--sigma-max"),
    ({"sigma_max": 0.001}, "--sigma-max"),
    ({"sigma_init": 0.0}, "--sigma-init"),
    ({"sigma_init": -2.5}, "--sigma-init"),
    ({"sigma_init": math.inf}, "--sigma-init"),
    ({"sigma_init": math.nan}, "--sigma-init"),
    ({"fake_lr": 0.0}, "--fake-lr"),
    ({"fake_lr": -1e-3}, "--fake-lr"),
    ({"fake_lr": math.nan}, "--fake-lr"),
    ({"score_num": 1}, "--score-num"),
    ({"score_num": 0}, "--score-num"),
    ({"class_frequencies": (0.0,) * 10}, "--class-frequencies"),
    ({"class_frequencies": (1.0,) * 9 + (-1.0,)}, "--class-frequencies"),
    ({"class_frequencies": (1.0,) * 9 + (math.inf,)}, "--class-frequencies"),
    ({"class_frequencies": (1.0,) * 9 + (math.nan,)}, "--class-frequencies"),
    ({"class_frequencies": (1.0,) * 9}, "--class-frequencies has 9 numbers"),
    ({"accumulate": 3}, "--accumulate"),
    ({"ema": 1.0}, "--ema"),
    ({"batch_size": 0}, "--batch-size"),
    ({"device": "tpu"}, "--device"),
    ({"resume": True, "overwrite": True}, "--resume"),
    ({"data": "nowhere"}, "nowhere"),
    ({"guidance_range": (0.0, 1.0)}, "--guidance-range"),
]


@pytest.mark.parametrize(("changes", "message"), SENSELESS, ids=lambda value: str(value)[:40])
def test_options_without_sense_are_refused_before_anything_is_made(models, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(models / "teacher", tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_class_frequencies_of_an_unconditional_teacher_are_refused(models, tmp_path):
    with pytest.raises(UserError, match=r"--class-frequencies has 1 numbers, but .* has 0 classes"):
        train(models / "unconditional", tmp_path / "run", class_frequencies=(1.0,))


@pytest.mark.parametrize("limits", [(0.0, 4.1), (-0.1, 4.0), (3.0, 1.0), (math.nan, 1.0)])
def test_strengths_that_the_teacher_does_not_know_are_refused(models, tmp_path, limits):
    with pytest.raises(UserError, match="--guidance-range"):
        train(models / "guided", tmp_path / "run", guidance_range=limits)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{"guidance_t_max": 799.0}, {"t_max": 500.0, "guidance_t_max": 400.0}])
def test_guidance_that_ends_needs_a_teacher_that_knows_none(models, tmp_path, options):
    with pytest.raises(UserError, match=r"--guidance-t-max .* w = 0"):
        train(models / "one strength", tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    for name, taken in (("guided", options), ("one strength", {"t_max": 500.0, "guidance_t_max": 500.0})):
        recipe.check_teacher(make_options(models / name, **taken), checkpoint.load(models / name))


@pytest.mark.parametrize("kind", ["stage2", "encoder", "two_student", "sid"])
def test_teachers_of_another_kind_are_refused(models, tmp_path, kind):
    with pytest.raises(UserError, match=f"{kind} is {begin.MODELS[kind]}, and train.sid takes a stage-1 model"):
        train(models / kind, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_of_other_images_are_refused(models, tmp_path):
    images = command_lines.write_images(tmp_path / "images")
    with pytest.raises(UserError, match="3×8×8"):
        train(models / "teacher", tmp_path / "run", data=str(images))
    assert not (tmp_path / "run").exists()


REFUSED = [
    (["--teacher", "nowhere"], ["nowhere"]),
    (["--teacher", "{teacher}", "--alpha", "0"], ["--alpha"]),
    (["--teacher", "{teacher}", "--t-max", "2000"], ["--t-max"]),
    (["--teacher", "{linear}"], ["0.002 to 0.01", "--sigma-min"]),
    (["--teacher", "{stage2}"], ["a stage-2 model", "takes a stage-1 model"]),
    (["--teacher", "{teacher}", "--guidance-range", "0", "4"], ["--guidance-range", "train.stage1"]),
    (["--teacher", "{teacher}", "--class-frequencies", "1", "2"], ["--class-frequencies", "2 numbers", "10 classes"]),
    (["--teacher", "{teacher}", "--data", "nowhere"], ["nowhere", "only score", "--data None"]),
    (["--teacher", "{teacher}", "--preset", "cifar11"], ["cifar11", "cifar10", "afhqv2-64"]),
]


@pytest.mark.parametrize(("arguments", "parts"), REFUSED, ids=lambda value: " ".join(value)[:50])
def test_mistakes_on_the_command_line_give_one_sentence(run, models, arguments, parts):
    arguments = [
        re.sub(r"\{(.*)\}", lambda found: str(models / found[1]), argument)
        for argument in [*arguments, "--out", "o", "--device", "cpu"]
    ]
    assert_refused(run("sid", *arguments), *parts)
    assert_refused(run("fastdiff", "sid", *arguments), *parts)
    assert not Path("o").exists()


# --- noise levels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "changes", "parts"),
    [
        ("linear", {}, ["0.002 to 0.01 ", "--sigma-min"]),
        ("edm", {"sigma_min": 0.001}, ["0.001 to 0.002 ", "--sigma-min"]),
        ("edm", {"sigma_max": 100.0, "t_max": 1000.0}, ["80 to 100 ", "--sigma-max"]),
        ("edm", {"sigma_init": 90.0}, ["80 to 90 ", "--sigma-init"]),
        (
            "linear",
            {"sigma_max": 1000.0, "t_max": 1000.0},
            ["0.002 to 0.01 ", "157 to 1e+03 ", "--sigma-min", "--t-max"],
        ),
    ],
)
def test_noise_levels_that_the_teacher_lacks_are_named(models, tmp_path, teacher, changes, parts):
    with pytest.raises(UserError) as caught:
        train(models / teacher, tmp_path / "run", **changes)
    for part in parts:
        assert part in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sigma_init", [1e-4, 0.005])
def test_a_start_below_what_the_teacher_knows_is_refused(models, tmp_path, sigma_init):
    """The generator's first noise level is one that it was never trained at, whatever the loss draws."""
    with pytest.raises(UserError, match="--sigma-init"):
        train(models / "linear", tmp_path / "run", sigma_min=0.0101, sigma_init=sigma_init)


@pytest.mark.parametrize(
    ("teacher", "changes"),
    [
        ("linear", {"sigma_min": 0.0101}),
        ("edm", {}),
        ("edm", {"t_max": 1000.0}),
        ("edm", {"sigma_max": 100.0, "t_max": 800.0}),
        ("edm", {"sigma_init": 80.0}),
    ],
)
def test_noise_levels_that_the_teacher_knows_are_taken(models, teacher, changes):
    made = checkpoint.load(models / teacher)
    options = make_options(models / teacher, **changes)
    options.check()
    recipe.check_teacher(options, made)
    assert recipe.generator_config(options, made).sigma_init == options.sigma_init


def test_a_linear_beta_teacher_learns_above_its_lowest_level(models, tmp_path, monkeypatch):
    seen, real = [], samplers.denoised

    def spy(model, z, angle, *arguments):
        seen.append(torch.tan(angle).min())
        return real(model, z, angle, *arguments)

    monkeypatch.setattr(samplers, "denoised", spy)
    model = train(models / "linear", tmp_path / "run", sigma_min=0.0101, updates=2, batch_size=64)
    assert min(seen) >= 0.0101 * (1 - 1e-9)
    assert all(value.isfinite().all() for value in model.parameters())
    assert model.schedule == LinearBetaSchedule() and model.config.parameterization == "eps"


# --- data and classes ---------------------------------------------------------------------------------------------


def test_no_image_is_read_without_data(models, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a data set was read")

    for name in ("load", "Batches"):
        monkeypatch.setattr(data, name, refuse)
    monkeypatch.setattr(metrics, "load_extractor", refuse)
    train(models / "teacher", tmp_path / "run")
    assert json.loads((tmp_path / "run/config.json").read_text())["data_fingerprint"] is None
    assert all("fd" not in row for row in lines_of(tmp_path / "run/scores.jsonl"))
    assert not (tmp_path / "run/best").exists()


def drawn(**changes):
    return next(recipe.DrawnBatches(10, make_options("unused", batch_size=20_000, **changes), CPU)).label


def test_classes_are_drawn_uniformly():
    counts = drawn().bincount(minlength=10).numpy()
    assert len(counts) == 10 and stats.chisquare(counts).pvalue > 0.01


def test_classes_are_drawn_by_their_frequencies():
    frequencies = np.array([0, 3, 1, 0, 2, 0.5, 0, 10, 1e-9, 0])
    counts = drawn(class_frequencies=tuple(frequencies)).bincount(minlength=10).numpy()
    assert len(counts) == 10 and (counts[frequencies == 0] == 0).all()
    often = frequencies > 0.1
    assert counts[often].sum() >= 19_999
    expected = frequencies[often] / frequencies[often].sum() * counts[often].sum()
    assert stats.chisquare(counts[often], expected).pvalue > 0.01
    only = drawn(class_frequencies=(0.0,) * 9 + (7.0,))
    assert (only == 9).all()


def test_a_class_that_is_never_wanted_is_not_drawn_at_the_edge_of_another(monkeypatch):
    draws = torch.tensor([0.0, 0.25, 0.5, 1 - 2**-24])  # the first and the last that there are
    monkeypatch.setattr(kernels, "rand", lambda *arguments, **options: draws)
    frequencies = (0.0, 1.0, 0.0, 1.0, 2.0, 0.0)
    batches = recipe.DrawnBatches(6, make_options("unused", batch_size=4, class_frequencies=frequencies), CPU)
    assert next(batches).label.tolist() == [1, 3, 4, 4]


def test_a_class_depends_on_the_sample_id_and_the_seed_alone():
    labels = drawn()
    small = recipe.DrawnBatches(10, make_options("unused", batch_size=7), CPU)
    parts = [next(small) for _ in range(5)]
    assert torch.equal(torch.cat([part.sample_ids for part in parts]), torch.arange(35))
    assert torch.equal(torch.cat([part.label for part in parts]), labels[:35])
    assert not torch.equal(drawn(seed=1), labels)


@pytest.mark.parametrize("which", [TIME, GUIDANCE])
def test_a_class_says_nothing_of_noise_level_and_strength(which):
    batch = next(recipe.DrawnBatches(10, make_options("unused", batch_size=20_000), CPU))
    tenth = (10 * batch.uniform(which)).long()
    counts = torch.zeros(10, 10).index_put((tenth, batch.label), torch.ones(20_000), accumulate=True)
    assert stats.chi2_contingency(counts.numpy()).pvalue > 0.01


def test_the_stream_of_classes_goes_on_where_it_stopped():
    whole, before, after = (recipe.DrawnBatches(10, make_options("unused"), CPU) for _ in range(3))
    expected = [next(whole) for _ in range(4)]
    next(before), next(before)
    after.restore(json.loads(json.dumps(before.state())))
    for batch in expected[2:]:
        found = next(after)
        assert torch.equal(found.sample_ids, batch.sample_ids) and torch.equal(found.label, batch.label)
        assert found.seed == batch.seed and found.x is None


def test_no_two_updates_share_a_sample(models):
    """Fake score and generator learn on fresh images each."""
    _, *updaters, batches = learning(models / "teacher")
    seen = []
    for updater in updaters:
        loss = updater.loss
        updater.loss = lambda model, b, loss=loss: (seen.append(b.sample_ids), loss(model, b))[1]
    iterate(updaters, batches, 3)
    ids = torch.cat(seen)
    assert len(seen) == 6 and len(ids.unique()) == len(ids) == 6 * 16


# --- one update ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["teacher", "guided", "edm", "unconditional"])
def test_both_learners_start_as_the_teacher(models, name):
    teacher, fake, generator, _ = learning(models / name)
    for updater in (fake, generator):
        assert_same_weights(updater.denoiser.network, teacher.network, atol=0, rtol=0)
        ours, theirs = ({p.data_ptr() for p in model.parameters()} for model in (updater.denoiser, teacher))
        assert not ours & theirs
    assert not {p.data_ptr() for p in fake.denoiser.parameters()} & {p.data_ptr() for p in generator.parameters}


def test_an_update_changes_one_network_alone(models):
    teacher, fake, generator, batches = learning(models / "guided")
    updaters = [fake, generator]
    held = {"teacher": teacher, "fake": fake.denoiser, "generator": generator.denoiser, "average": generator.averaged}
    for updater, changed in ((fake, {"fake"}), (generator, {"generator", "average"}), (fake, {"fake"})):
        before = {name: state_of(model) for name, model in held.items()}
        moments = {id(u): copy.deepcopy(u.optimizer.state_dict()) for u in updaters}
        update_alone(updater, updaters, next(batches))
        assert {name for name, model in held.items() if not same(model, before[name])} == changed
        assert all(p.grad is None for model in held.values() for p in model.parameters())
        other = fake if updater is generator else generator
        assert str(other.optimizer.state_dict()) == str(moments[id(other)])


def test_frozen_networks_collect_no_gradients_while_another_learns(models):
    """Looked at when the optimizer steps, since gradients are thrown away after it."""
    teacher, fake, generator, batches = learning(models / "guided")
    updaters, seen = [fake, generator], []
    for updater in updaters:
        step = updater.optimizer.step

        def watched(updater=updater, step=step):
            others = [model for model in (teacher, fake.denoiser, generator.denoiser) if model is not updater.denoiser]
            seen.append(all(p.grad is None and not p.requires_grad for model in others for p in model.parameters()))
            assert all(p.grad is not None for p in updater.parameters)
            step()

        updater.optimizer.step = watched
    iterate(updaters, batches, 2)
    assert seen == [True] * 4


def test_a_network_that_serves_another_is_in_eval_mode(models):
    teacher, fake, generator, batches = learning(models / "teacher")
    updaters, modes = [fake, generator], []
    for updater in updaters:
        loss = updater.loss
        updater.loss = lambda model, b, loss=loss: (
            modes.append([m.training for m in (teacher, fake.denoiser, generator.denoiser)]),
            loss(model, b),
        )[1]
    iterate(updaters, batches, 2)
    assert modes == [[False, True, False], [False, False, True]] * 2


def test_learning_rates_and_moments_are_those_asked_for(models):
    _, fake, generator, batches = learning(models / "teacher", lr=3e-4, fake_lr=5e-4, betas=(0.9, 0.99))
    iterate([fake, generator], batches)
    found = [(u.optimizer.param_groups[0]["lr"], u.optimizer.param_groups[0]["betas"]) for u in (fake, generator)]
    assert found == [(5e-4, (0.0, 0.99)), (3e-4, (0.9, 0.99))]
    _, fake, generator, _ = learning(models / "teacher", lr=3e-4)
    assert fake.learning_rate() == generator.learning_rate() == 3e-4
    assert not fake.options.ema and generator.options.ema == 0.999 and generator.options.betas == (0.0, 0.999)


def test_options_reach_the_losses(models, monkeypatch):
    seen = {}
    for name in ("generator", "fake_score"):
        real = getattr(sid, name)

        def spy(*arguments, real=real, name=name, **options):
            seen[name] = options
            return real(*arguments, **options)

        monkeypatch.setattr(sid, name, spy)
    _, *updaters, batches = learning(
        models / "guided",
        alpha=0.7,
        t_max=600.0,
        sigma_init=3.0,
        sigma_min=0.01,
        sigma_max=50.0,
        guidance_range=(1.0, 2.0),
        guidance_t_max=500.0,
    )
    iterate(updaters, batches)
    levels = KarrasSchedule(0.01, 50.0)
    assert seen["generator"] == {
        "alpha": 0.7,
        "t_max": 600.0,
        "levels": levels,
        "sigma": 3.0,
        "guidance_range": (1.0, 2.0),
        "guidance_t_max": 500.0,
    }
    assert seen["fake_score"] == {"sigma": 3.0, "guidance_range": (1.0, 2.0)}


def gradients_of(updaters, batches):
    """What an update hands to each optimizer, away from the start, where there is nothing to learn.

    Weights say less: Adam makes rounding errors of tiny gradients large.
    """
    found = []
    for seed, updater in enumerate(updaters):
        randomize(updater.denoiser, scale=0.2, seed=7 + seed)
        updater.optimizer.step = lambda updater=updater: found.append([p.grad.clone() for p in updater.parameters])
    iterate(updaters, batches)
    return found


@pytest.mark.parametrize("name", ["guided", "unconditional"])
def test_accumulation_equals_the_whole_batch(models, name):
    whole, parts = (learning(models / name, accumulate=count) for count in (1, 4))
    pairs = zip(gradients_of(whole[1:3], whole[3]), gradients_of(parts[1:3], parts[3]), strict=True)
    for expected, found in pairs:
        scale = max(float(gradient.abs().max()) for gradient in expected)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(b, a, atol=1e-5 * scale, rtol=1e-4)
    for a, b in zip(whole[1:3], parts[1:3], strict=True):
        assert float(b.grad_norm) == pytest.approx(float(a.grad_norm), rel=1e-4)
        assert float(b.loss_sum) == pytest.approx(float(a.loss_sum), rel=1e-4)


def test_a_part_of_a_batch_is_all_that_is_in_memory(models):
    sizes = []
    _, *updaters, batches = learning(models / "teacher", accumulate=4)
    for updater in updaters:
        loss = updater.loss
        updater.loss = lambda model, b, loss=loss: (sizes.append(len(b.label)), loss(model, b))[1]
    iterate(updaters, batches)
    assert sizes == [4] * 8


def test_gradient_checkpointing_changes_no_update(models):
    whole, saving = (learning(models / "guided", gradient_checkpointing=on, dropout=0.3) for on in (False, True))
    for chosen, on in ((whole, False), (saving, True)):
        networks = [chosen[0].network, *(updater.denoiser.network for updater in chosen[1:3])]
        assert [network.gradient_checkpointing for network in networks] == [on] * 3
    found = []
    for _, *updaters, batches in (whole, saving):
        torch.manual_seed(3)  # of dropout
        found.append(gradients_of(updaters, batches))
    for expected, gradients in zip(*found, strict=True):
        for a, b in zip(expected, gradients, strict=True):
            torch.testing.assert_close(b, a, atol=1e-6 * float(a.abs().max()), rtol=1e-5)


def test_bfloat16_is_an_autocast_of_float32_weights(models):
    seen, results = [], {}
    for precision in ("bf16", "fp32"):
        _, *updaters, batches = learning(models / "guided", precision=precision)
        for updater in updaters:
            loss = updater.loss
            updater.loss = lambda model, b, loss=loss: (seen.append(torch.is_autocast_enabled("cpu")), loss(model, b))[
                1
            ]
        iterate(updaters, batches)
        assert all(p.dtype == torch.float32 for u in updaters for p in u.parameters)
        results[precision] = [float(u.loss_sum) for u in updaters]
    assert seen == [True, True, False, False]
    assert results["bf16"] == pytest.approx(results["fp32"], rel=0.1)


ARCHITECTURE = UNetConfig((8, 8), 1, 10, channels=8, channel_mult=(1,), blocks=1, head_width=8, dropout=0.1)


@pytest.mark.parametrize("kind", ["guided edm", "unconditional v"])
def test_an_update_never_waits_for_the_device(kind):
    """On the meta device, which holds no values: waiting for one, branching on one, or leaving the device raises."""
    guided = kind == "guided edm"
    unet = replace(ARCHITECTURE, num_classes=10 if guided else 0)
    with META:
        teacher = Denoiser(
            DenoiserConfig(unet, KarrasSchedule() if guided else CosineSchedule(), "edm" if guided else "v")
        )
        teacher = stage1.student_of(teacher, LIMITS) if guided else teacher
    options = make_options("unused", batch_size=4, accumulate=2, clip_norm=1.0, weight_decay=0.1, dropout=None)
    updaters, batches = recipe.learning(teacher.eval(), options)
    iterate(updaters, batches)
    for updater in updaters:
        assert updater.update_count == 1
        values = (updater.loss_sum, updater.grad_norm, updater.first_bad, updater.dropped, updater.samples)
        assert {value.device for value in values} == {META}


def test_the_fake_score_learns_and_the_gap_is_logged(models, tmp_path):
    train(models / "guided", tmp_path / "run", updates=30, log_every=10, save_every=30, lr=1e-6, fake_lr=5e-3)
    rows = lines_of(tmp_path / "run/metrics.jsonl")
    assert [row["update"] for row in rows] == [10, 20, 30] and all(row["images"] == 16 * row["update"] for row in rows)
    assert rows[-1]["fake_loss"] < 0.9 * rows[0]["fake_loss"]
    for row in rows:
        assert len(row["score_gap_quarters"]) == 4 and min(row["score_gap_quarters"]) > 0
        names = ("loss", "loss_quarters", "grad_norm", "lr")
        assert row.keys() >= {*names, *(f"fake_{name}" for name in names)}
        assert (row["lr"], row["fake_lr"]) == (1e-6, 5e-3)


# --- a run and its checkpoint -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(runs, extractor, tmp_path_factory):
    """A guided run on the shared stage 1, scored on digits. Read it only."""
    out = tmp_path_factory.mktemp("sid") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "preview", lambda *args: REAL_PREVIEW(*args, columns=2))
        train(runs.stage1, out, data="digits", score_num=32, lr=1e-3, keep=1, score_guidance=(0.0, 4.0, 9.0))
    return out


def test_the_checkpoint_says_what_it_is(made, runs):
    said = json.loads((checkpoint.find(made) / "model.json").read_text())
    assert (said["kind"], said["sampler"], said["steps"], said["sigma_init"]) == ("sid", "one_step", 1, 2.5)
    assert said["guidance_range"] == [0.0, 4.0] and said["unet"]["guidance_input"]
    assert said["class_names"] == list("0123456789")
    teacher = checkpoint.load(runs.stage1)
    model = checkpoint.load(made)
    assert model.config == replace(teacher.config, kind="sid", sampler="one_step", steps=1, sigma_init=2.5)
    assert any(
        not torch.equal(value, teacher.network.state_dict()[key]) for key, value in model.network.state_dict().items()
    )
    folders = sorted(path.name for path in made.iterdir() if path.is_dir())
    assert folders == ["best", "checkpoint-0000006"]
    assert sorted(path.name for path in made.glob("*.png")) == [f"samples-sid-{n:07d}.png" for n in (3, 6)]


def test_the_saved_weights_are_the_moving_average(made):
    folder = checkpoint.find(made)
    saved, (_, state) = checkpoint.load(folder).network.state_dict(), checkpoint.load_state(folder)
    assert all(torch.equal(value, state[f"ema/{key}"]) for key, value in saved.items())
    assert any(not torch.equal(value, state[f"weights/{key}"]) for key, value in saved.items())
    assert {f"fake_weights/{key}" for key in saved} <= state.keys() and not any(
        key.startswith("fake_ema") for key in state
    )


@pytest.mark.parametrize(
    ("limits", "expected"), [(None, (0, 4)), ((1.0, 3.0), (1, 3)), ((2.0, 2.0), (2, 2)), ((0.0, 0.0), (0, 0))]
)
def test_the_strengths_are_those_asked_for(models, tmp_path, limits, expected, monkeypatch):
    """All three networks see them, in both losses."""
    seen = {}
    for name in ("generator", "fake_score"):
        real = getattr(sid, name)

        def spy(*arguments, real=real, name=name, **options):
            seen.setdefault(name, []).append(options["guidance_range"])
            return real(*arguments, **options)

        monkeypatch.setattr(sid, name, spy)
    train(models / "guided", tmp_path / "run", guidance_range=limits, updates=2, save_every=2)
    assert seen == {"generator": [expected] * 2, "fake_score": [expected] * 2}
    assert checkpoint.load(tmp_path / "run").config.guidance_range == expected
    scored = lines_of(tmp_path / "run/scores.jsonl")
    assert len(scored) == 1


@pytest.mark.parametrize("name", ["teacher", "guided", "one strength", "unconditional"])
def test_a_preview_is_one_call_an_image(models, tmp_path, name):
    options = make_options(models / name)
    model = checkpoint.load(models / name)
    model.config = recipe.generator_config(options, model)
    REAL_PREVIEW(model, tmp_path / "a.png", 0, columns=2)
    assert (tmp_path / "a.png").is_file() and model.network_rows == 2 * (model.num_classes or 4)


def test_one_strength_inside_the_teacher_is_kept(models, tmp_path):
    model = train(models / "one strength", tmp_path / "run", updates=1)
    assert model.config.guidance_range == (2.0, 2.0) and not model.config.unet.guidance_input


def test_a_conditional_teacher_gives_a_generator_of_one_call(models, tmp_path):
    """w = 0 alone, so that nothing samples it by two calls."""
    train(models / "teacher", tmp_path / "run", updates=1)
    model = with_guidance(checkpoint.load(tmp_path / "run"))
    assert model.config.guidance_range == (0.0, 0.0)
    images = next(generate(model, 7, Sampling(guidance=0.0, steps=1, sampler="one_step")))
    assert model.network_rows == 7 and images.isfinite().all()


def test_an_unconditional_teacher_gives_an_unconditional_generator(models, tmp_path, run):
    train(models / "unconditional", tmp_path / "run")
    model = checkpoint.load(tmp_path / "run")
    assert model.config.guidance_range is None and model.num_classes == 0
    rows = lines_of(tmp_path / "run/scores.jsonl")
    assert [row["update"] for row in rows] == [3, 6]
    result = run("sample", "--checkpoint", tmp_path / "run", "--num", "5", "--device", "cpu", "--out", "a.png")
    assert result.code == 0 and "5 images in 1 one_step steps, 1 network calls an image" in result.out, result
    assert_refused(
        run("sample", "--checkpoint", tmp_path / "run", "--guidance", "1", "--device", "cpu"), "--guidance 1"
    )


def test_images_are_made_in_one_call_from_sigma_init(models, tmp_path):
    train(models / "edm", tmp_path / "run", updates=1, sigma_init=0.75)
    model = checkpoint.load(tmp_path / "run")
    found = next(generate(model, 4, Sampling(guidance=0.0, steps=1, sampler="one_step", clip=False, seed=2)))
    z = 0.6 * kernels.randn((4, 1, 8, 8), seed=2, sample_ids=torch.arange(4), step=0, device="cpu")  # tan φ = 3/4
    with torch.no_grad():
        v = model(z, torch.full((4,), math.atan(0.75)), torch.arange(4))
    torch.testing.assert_close(found, 0.8 * z - 0.6 * v, atol=1e-5, rtol=1e-5)


def test_the_checkpoint_is_sampled_and_scored_with_one_call_an_image(made, run):
    result = run(
        "sample", "--checkpoint", made, "--num", "6", "--guidance", "0", "4", "--device", "cpu", "--out", "grid.png"
    )
    assert result.code == 0 and not result.err, result.err
    assert "6 images in 1 one_step steps, 1 network calls an image" in result.out
    result = run(
        "evaluate", "--checkpoint", made, "--num", "20", "--guidance", "0", "2", "--device", "cpu", "--out", "r.json"
    )
    assert result.code == 0 and not result.err, result.err
    rows = json.loads(Path("r.json").read_text())["rows"]
    assert [(row["sampler"], row["steps"], row["nfe"], row["guidance"]) for row in rows] == [
        ("one_step", 1, 1.0, 0.0),
        ("one_step", 1, 1.0, 2.0),
    ]


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize(
    "extra",
    [["--sampler", name] for name in ("ddim", "stochastic", "ancestral", "heun")]
    + [["--sampler", "ddim", "--force"], ["--steps", "2"], ["--steps", "2", "--force"]],
    ids=" ".join,
)
def test_other_samplers_and_steps_are_refused(made, run, command, extra):
    result = run(command, "--checkpoint", made, "--num", "4", "--device", "cpu", "--out", "o.png", *extra)
    assert_refused(result, extra[0], extra[1], made)
    assert not Path("o.png").exists()


def test_its_own_sampler_may_be_named(made, run):
    result = run(
        "sample",
        "--checkpoint",
        made,
        "--num",
        "2",
        "--sampler",
        "one_step",
        "--steps",
        "1",
        "--device",
        "cpu",
        "--out",
        "o.png",
    )
    assert result.code == 0 and Path("o.png").is_file(), result.err


@pytest.mark.parametrize("name", ["teacher", "guided", "stage2"])
def test_one_step_is_not_for_other_models(models, run, name):
    for force in ([], ["--force"]):
        result = run("sample", "--checkpoint", models / name, "--sampler", "one_step", "--device", "cpu", *force)
        assert_refused(result, "one_step", name)


def test_a_generator_teaches_no_other_recipe(models, tmp_path):
    common = {"teacher": models / "sid", "out": tmp_path / "run", "device": "cpu"}
    for module, options in (
        (stage1, {}),
        (stage2, {"start_steps": 2}),
        (stage2, {"start_steps": 64}),
        (encoder, {"start_steps": 2}),
        (encoder, {"start_steps": 64, "end_steps": 8}),
        (two_student, {"start_steps": 2, "guidance": 1.0}),
    ):
        with pytest.raises(UserError):
            module.train(module.Options(**common, **options))
        assert not (tmp_path / "run").exists(), module.__name__


# --- scores -------------------------------------------------------------------------------------------------------


def test_scores_are_written_at_every_save(made):
    rows = lines_of(made / "scores.jsonl")
    assert [(row["run"], row["update"], row["images"]) for row in rows] == [("sid", 3, 48), ("sid", 6, 96)]
    for row in rows:
        assert [score["guidance"] for score in row["scores"]] == [0.0, 4.0]  # 9 is not learned
        assert row["fd"] == pytest.approx(np.mean([score["fd"] for score in row["scores"]]), abs=1e-3) and row["fd"] > 0
        assert row["spread"] > 0 and 0 <= row["near_duplicates"] <= 1 and isinstance(row["alarms"], list)


def scripted(monkeypatch, distances):
    """Scores without scoring: the distances in turn."""
    stream = iter(distances)
    monkeypatch.setattr(recipe.Reference, "load", lambda *args, **kwargs: object())

    def scored(model, reference, sampling, **others):
        return SimpleNamespace(guidance=sampling.guidance, fd=next(stream), score=1.0)

    monkeypatch.setattr(recipe, "evaluate", scored)


def same_weights(first, second):
    return same(checkpoint.load(first).network, checkpoint.load(second).network.state_dict())


@pytest.mark.parametrize(("distances", "winner"), [([5.0, 2.0, 3.0], 4), ([2.0, 2.0, 2.0], 2)])
def test_the_best_checkpoint_is_kept(models, tmp_path, monkeypatch, distances, winner):
    scripted(monkeypatch, distances)
    out = tmp_path / "run"
    train(models / "teacher", out, data="digits", save_every=2, keep=3, lr=1e-2)
    equal = [n for n in (2, 4, 6) if same_weights(out / "best", out / f"checkpoint-{n:07d}")]
    assert equal == [winner]
    best = checkpoint.load(out / "best")
    assert best.config.kind == "sid" and best.config.sigma_init == 2.5
    assert [row["fd"] for row in lines_of(out / "scores.jsonl")] == distances


def test_the_best_of_an_interrupted_run_stays_the_best(models, tmp_path, monkeypatch):
    """Even when its own checkpoint is long gone."""
    scripted(monkeypatch, [1.0, 2.0, 3.0])
    out, options = tmp_path / "run", {"data": "digits", "save_every": 2, "keep": 1, "lr": 1e-2}
    train(models / "teacher", out, updates=2, **options)
    shutil.copytree(checkpoint.find(out), tmp_path / "first")
    train(models / "teacher", out, updates=6, resume=True, **options)
    assert same_weights(out / "best", tmp_path / "first") and not same_weights(out, tmp_path / "first")


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_what_is_scored_is_what_is_saved_in_eval_mode(models, tmp_path, monkeypatch, ema):
    """Dropout has no place in a score."""
    seen, real = [], recipe.generate

    def spy(model, labels, sampling):
        dropout = (part.training for part in model.modules() if isinstance(part, torch.nn.Dropout))
        seen.append((sampling.sampler, any(dropout)))
        return real(model, labels, sampling)

    monkeypatch.setattr(recipe, "generate", spy)
    train(models / "teacher", tmp_path / "run", ema=ema, dropout=0.5, updates=2, save_every=1)
    assert seen == [("ddim", False), ("one_step", False), ("one_step", False)]


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_scoring_changes_nothing_of_what_is_learned(models, tmp_path, monkeypatch, ema):
    scripted(monkeypatch, range(100))
    options = {"ema": ema, "dropout": 0.5, "updates": 3, "lr": 1e-3}
    often = train(models / "guided", tmp_path / "often", save_every=1, data="digits", **options)
    once = train(models / "guided", tmp_path / "once", save_every=3, **options)
    assert_same_weights(often, once, atol=0, rtol=0)


def test_a_collapse_is_told(models, tmp_path, monkeypatch, capsys):
    """Not before the second score: a generator starts with little variety, and gains it."""
    train(models / "guided", tmp_path / "well", lr=1e-12)
    assert not any("near-duplicate" in a for row in lines_of(tmp_path / "well/scores.jsonl") for a in row["alarms"])
    real = recipe.generate

    def collapsed(model, labels, sampling):
        for images in real(model, labels, sampling):
            yield images[:1].expand_as(images) if sampling.sampler == "one_step" else images

    monkeypatch.setattr(recipe, "generate", collapsed)
    capsys.readouterr()
    train(models / "guided", tmp_path / "run", lr=1e-12)
    first, second = lines_of(tmp_path / "run/scores.jsonl")
    assert first["spread"] == second["spread"] == 0 and first["near_duplicates"] == second["near_duplicates"] == 1
    assert len(first["alarms"]) == 1 and "near-duplicate" in first["alarms"][0]
    assert len(second["alarms"]) == 2 and "varies 0.00 times" in second["alarms"][0]
    assert capsys.readouterr().out.count("warning: collapse?") == 3


@pytest.mark.parametrize("num", [2, 11])
def test_few_images_are_enough_for_a_score(models, tmp_path, num):
    train(models / "guided", tmp_path / "run", score_num=num, updates=2, save_every=1)
    assert all(math.isfinite(row["spread"]) for row in lines_of(tmp_path / "run/scores.jsonl"))


def test_an_unconditional_generator_is_scored_on_data_with_labels(models, extractor, tmp_path):
    train(models / "unconditional", tmp_path / "run", data="digits", updates=1)
    (row,) = lines_of(tmp_path / "run/scores.jsonl")
    assert row["fd"] > 0 and checkpoint.load(tmp_path / "run/best").config.kind == "sid"


def test_data_without_labels_serve_no_distance(models, tmp_path):
    images = command_lines.write_images(tmp_path / "images", classes=(), channels=1)
    train(models / "unconditional", tmp_path / "run", data=str(images), updates=1)
    (row,) = lines_of(tmp_path / "run/scores.jsonl")
    assert "fd" not in row and row["spread"] > 0


# --- stopping and continuing --------------------------------------------------------------------------------------

LONG = {"updates": 8, "save_every": 4, "log_every": 2, "lr": 1e-3, "ema": 0.9, "dropout": 0.3, "keep": 5}


def interrupt(monkeypatch, update):
    """Stop in the generator's part of an update, after the fake score's."""
    real = Updater.update

    def stopping(self, batch):
        if not self.name and self.update_count + 1 == update:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(Updater, "update", stopping)


def without_clocks(rows):
    return [
        {key: value for key, value in row.items() if key not in ("images_per_second", "time", "memory_gb")}
        for row in rows
    ]


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """A run that nothing stopped. Read it only."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "preview", lambda *args, **kwargs: None)
        patch.setattr(recipe, "COLLAPSED", 100.0)  # an alarm wherever there may be one
        train(models / "guided", out, **LONG)
    return out


@pytest.fixture(scope="module", params=[5, 7], ids=["right after a checkpoint", "after more lines of the log"])
def continued(request, models, tmp_path_factory):
    """The same run, stopped in an update and continued. Read it only."""
    out = tmp_path_factory.mktemp("continued") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "preview", lambda *args, **kwargs: None)
        patch.setattr(recipe, "COLLAPSED", 100.0)
        with patch.context() as stopping:
            interrupt(stopping, request.param)
            with pytest.raises(KeyboardInterrupt):
                train(models / "guided", out, **LONG)
        assert checkpoint.find(out).name == "checkpoint-0000004"
        train(models / "guided", out, resume=True, **LONG)
    return out


def test_a_continued_run_ends_bit_for_bit_as_a_whole_one(whole, continued):
    """Weights, average, both optimizers, the stream of samples, counters and random states."""
    for step in (4, 8):
        folders = [out / f"checkpoint-{step:07d}" for out in (whole, continued)]
        states = [checkpoint.load_state(folder) for folder in folders]
        assert states[0][0] == states[1][0] and states[0][1].keys() == states[1][1].keys()
        assert all(torch.equal(value, states[1][1][key]) for key, value in states[0][1].items())
        assert (folders[0] / "model.safetensors").read_bytes() == (folders[1] / "model.safetensors").read_bytes()


def test_a_continued_runs_log_is_that_of_a_whole_one(whole, continued):
    logs = [without_clocks(lines_of(out / "metrics.jsonl")) for out in (whole, continued)]
    assert [row["update"] for row in logs[0]] == [2, 4, 6, 8]
    assert logs[1] == logs[0]


def test_a_continued_runs_scores_are_those_of_a_whole_one(whole, continued):
    """Alarms too: what they compare with is no less true after an interruption."""
    scores = [lines_of(out / "scores.jsonl") for out in (whole, continued)]
    assert scores[0][1]["alarms"], "the whole run should have raised one"
    assert scores[1] == scores[0]


def test_other_options_cannot_continue_a_run(models, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    before = snapshot(tmp_path / "run")
    for change in (
        {"alpha": 1.0},
        {"fake_lr": 1e-5},
        {"data": "digits"},
        {"class_frequencies": (1.0,) * 10},
        {"seed": 1},
    ):
        with pytest.raises(UserError, match=f"--{next(iter(change)).replace('_', '-')} was"):
            train(models / "guided", tmp_path / "run", **(LONG | change), resume=True)
    assert snapshot(tmp_path / "run") == before


def test_a_run_is_never_overwritten_unasked(models, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(UserError, match="--resume"):
        train(models / "guided", tmp_path / "run", **LONG)
    (tmp_path / "run/best").mkdir()
    train(models / "guided", tmp_path / "run", overwrite=True, updates=1)
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == ["checkpoint-0000001", "config.json", "metrics.jsonl", "scores.jsonl"]
    assert len(lines_of(tmp_path / "run/scores.jsonl")) == 1


# --- samples that are not finite ----------------------------------------------------------------------------------


def break_from(monkeypatch, update, share, *, which="generator"):
    """From an update on, this share of a loss is not a number."""
    real, calls = getattr(sid, which), iter(range(1, 10**6))

    def breaking(*arguments, **options):
        result, bad = real(*arguments, **options), next(calls) >= update
        loss, others = result if isinstance(result, tuple) else (result, None)
        rows = torch.arange(len(loss)) < round(share * len(loss)) * bad
        loss = torch.where(rows, math.nan, loss)
        return loss if others is None else (loss, others)

    monkeypatch.setattr(sid, which, breaking)


@pytest.mark.parametrize("which", ["generator", "fake_score"])
def test_too_many_samples_that_are_not_finite_end_the_run(models, tmp_path, monkeypatch, which):
    """The last good checkpoint is there, can be sampled, and continued."""
    monkeypatch.setattr("train.updater.MANY_SAMPLES", 64)
    options = {"updates": 9, "save_every": 4, "log_every": 8, "ema": 0.9}
    with monkeypatch.context() as patch:
        break_from(patch, 5, 0.5, which=which)
        with pytest.raises(UserError, match=r"not finite .*--resume") as caught:
            train(models / "guided", tmp_path / "run", **options)
    assert "32 of 64 samples" in str(caught.value) and str(tmp_path / "run") in str(caught.value)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-0000004"]
    images = next(generate(checkpoint.load(tmp_path / "run"), 4, Sampling(guidance=1.0, steps=1, sampler="one_step")))
    assert images.isfinite().all()
    result = train(models / "guided", tmp_path / "run", resume=True, **options)
    assert_same_weights(result, train(models / "guided", tmp_path / "whole", **options), atol=0, rtol=0)


def test_through_the_command_line_that_is_one_sentence(models, tmp_path, monkeypatch, run):
    monkeypatch.setattr("train.updater.MANY_SAMPLES", 16)
    break_from(monkeypatch, 1, 1.0)
    result = run(
        "sid",
        "--teacher",
        models / "guided",
        "--out",
        "o",
        "--device",
        "cpu",
        "--batch-size",
        "16",
        "--updates",
        "20",
        "--log-every",
        "10",
    )
    assert result.code == 2 and "Traceback" not in result.err
    assert result.err.strip().splitlines()[-1].startswith("error: the losses of 160 of 160 samples were not finite")
    assert not list(Path("o").glob("checkpoint-*"))


def test_a_few_samples_that_are_not_finite_are_left_out_and_counted(models, tmp_path, monkeypatch):
    """One in each of five updates; and every line of the log is JSON, which knows no NaN."""
    break_from(monkeypatch, 1, 1 / 16)
    model = train(models / "guided", tmp_path / "run", updates=5, save_every=5, log_every=5)
    assert all(value.isfinite().all() for value in model.parameters())
    _, tensors = checkpoint.load_state(checkpoint.find(tmp_path / "run"))
    assert int(tensors["dropped"]) == 5 and int(tensors["fake_dropped"]) == 0
    (row,) = lines_of(tmp_path / "run/metrics.jsonl")
    assert math.isfinite(row["loss"])


@pytest.mark.parametrize(("updates", "allowed"), [(1, 100), (625, 100), (1250, 200)])
def test_samples_that_are_not_finite_may_be_one_in_a_hundred(models, updates, allowed):
    """Of those since the last look, or of 10,000: one bad sample among the first few is no reason to stop."""
    _, _, generator, _ = learning(models / "teacher")
    for dropped in (allowed, allowed + 1):
        generator.update_count, generator.watched_from = updates, 0
        generator.dropped.fill_(dropped)
        if dropped > allowed:
            with pytest.raises(UserError, match=f"{dropped} of {16 * updates} samples"):
                generator.check_finite()
        else:
            generator.check_finite()
            forgiven = updates >= 625
            assert int(generator.dropped) == (0 if forgiven else dropped)
            assert generator.watched_from == (updates if forgiven else 0)


# --- variety ------------------------------------------------------------------------------------------------------


def noise_images(count, *shape, seed=0):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_variety_of_noise_is_its_variance():
    images, labels = noise_images(400, 3, 8, 8), torch.arange(400) % 4
    images[labels == 2] *= 0.5
    found = metrics.variety(images, labels)
    expected = [images[labels == k].double().flatten(1).numpy().var(0, ddof=1).mean() for k in range(4)]
    assert found.spread.tolist() == pytest.approx(expected, rel=1e-6) and found.near_duplicates == 0
    assert expected[2] == pytest.approx(expected[0] / 4, rel=0.1)


def test_variety_is_within_classes():
    """Ten images, one a class, are a collapse, however much they differ."""
    labels = torch.arange(200) % 10
    images = noise_images(10, 1, 8, 8)[labels] + 1e-3 * noise_images(200, 1, 8, 8, seed=1)
    assert metrics.variety(images, labels).spread.max() < 1e-6 < metrics.variety(images, labels * 0).spread.min()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 64, 64)], ids=str)
@pytest.mark.parametrize("count", [10, 48, 200])
def test_one_image_again_and_again_is_all_duplicates(shape, count):
    for seed in range(5):
        images = noise_images(1, *shape, seed=seed).expand(count, *shape)
        found = metrics.variety(images, torch.zeros(count, dtype=torch.int64))
        assert found.near_duplicates == 1 and found.spread.max() < 1e-12, seed


@pytest.mark.parametrize("repeated", [0, 2, 30, 60])
def test_near_duplicates_are_counted(repeated):
    images = noise_images(100, 3, 8, 8)
    images[:repeated] = images[0]
    images[1:repeated] += 0.01 * noise_images(max(0, repeated - 1), 3, 8, 8, seed=1)  # a fifteenth of their distance
    assert metrics.variety(images, torch.zeros(100, dtype=torch.int64)).near_duplicates == repeated / 100


def test_repeated_images_of_different_classes_are_no_duplicates():
    images = noise_images(50, 1, 8, 8).repeat(2, 1, 1, 1)
    assert metrics.variety(images, torch.arange(100) // 50).near_duplicates == 0
    assert metrics.variety(images, torch.zeros(100, dtype=torch.int64)).near_duplicates == 1


def test_real_digits_are_varied():
    digits = data.load("digits", "train")
    images, labels = data.to_float(torch.from_numpy(digits.images)), torch.from_numpy(digits.labels)
    found = metrics.variety(images, labels)
    assert found.near_duplicates < 0.01 and found.spread.min() > 0.05 and len(found.spread) == 10
    twice = metrics.variety(images[:500].repeat(2, 1, 1, 1), labels[:500].repeat(2))
    assert twice.near_duplicates == 1


def test_few_images_of_a_class_count_as_one_class():
    images = noise_images(20, 1, 8, 8)
    found = metrics.variety(images, torch.arange(20) % 10)
    assert found.spread.shape == (1,) and found.spread[0] == pytest.approx(
        float(images.double().var(0).mean()), rel=1e-6
    )


# --- without running ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra", [[], ["--data", "digits"], ["--accumulate", "4"], ["--preset", "digits"]], ids=" ".join
)
def test_a_dry_run_says_what_would_be_done_and_does_nothing(run, runs, extra):
    result = run(
        "sid", *extra, "--teacher", runs.stage1, "--out", "o", "--device", "cpu", "--updates", "70", "--dry-run"
    )
    assert result.code == 0 and not result.err, result.err
    assert re.search(r"model +([\d.]+) M parameters, images 1×8×8", result.out)
    assert re.search(r"updates +70 of each network, 128 images each", result.out)
    assert re.search(r"memory +about [\d.]+ GiB", result.out) and not Path("o").exists()


def test_a_dry_run_counts_what_an_update_holds(runs, capsys):
    """Two networks that learn with gradients and two moments, an average, a frozen teacher, and three passes."""
    options = make_options(runs.stage1, dry_run=True, batch_size=512, ema=0.9)
    assert recipe.train(options) is None
    config = checkpoint.load(runs.stage1).config
    weights = sum(p.numel() for p in checkpoint.load(runs.stage1).parameters())
    expected = 4 * (2 * 4 + 1 + 1) * weights + begin.activation_bytes(config, 3 * 512, options)
    found = float(re.search(r"memory +about ([\d.e-]+) GiB", capsys.readouterr().out)[1])
    assert found == pytest.approx(expected / 2**30, rel=0.01)


@pytest.mark.parametrize(
    ("preset", "parts"),
    [
        ("cifar10", ["256", "1e-05", "390625", "bf16"]),
        ("imagenet64", ["8192", "4e-06", "bf16"]),
        ("ffhq64", ["512", "1e-05", "0.9 0.999"]),
        ("afhqv2-64", ["512", "5e-06"]),
    ],
)
def test_presets_hold_the_published_settings(run, preset, parts):
    text = run("sid", "--preset", preset, "--help").out
    for part in parts:
        assert f"(default: {part})" in text, part
    assert set(recipe.PRESETS) == {"digits", "fashion-mnist", "cifar10", "imagenet64", "ffhq64", "afhqv2-64"}


def test_alpha_and_noise_levels_of_the_published_presets():
    published = ("cifar10", "imagenet64", "ffhq64", "afhqv2-64")
    alphas = [recipe.PRESETS[name].get("alpha", recipe.Options.alpha) for name in published]
    assert alphas == [1.2, 1.2, 1.2, 1.0]
    for name in published:
        assert not {"t_max", "sigma_init", "sigma_min", "sigma_max", "guidance_t_max"} & recipe.PRESETS[name].keys()
    defaults = recipe.Options
    assert (defaults.t_max, defaults.sigma_init, defaults.sigma_min, defaults.sigma_max) == (800, 2.5, 0.002, 80)
    assert defaults.guidance_t_max >= 1000  # guidance everywhere


def test_the_command_is_known():
    assert commands.COMMANDS["sid"][0] == "train.sid"
