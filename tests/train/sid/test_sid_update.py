"""What one update of SiD changes, and what it leaves."""

import copy
from dataclasses import replace

import command_lines
import pytest
import torch
from common import assert_same_weights, randomize
from sid_runs import LIMITS, META, iterate, learning, lines_of, make_options, same, state_of, train

from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.losses import sid
from fastdiff.schedule import CosineSchedule, KarrasSchedule
from fastdiff.unet import UNetConfig
from train import sid as recipe
from train import stage1
from train.updater import learn_alone

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


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
        learn_alone(updater, updaters)
        updater.update(next(batches))
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


def test_a_run_in_bfloat16_compares_with_the_teacher_whose_weights_are_so(models, tmp_path):
    train(models / "guided", tmp_path / "run", precision="bf16", updates=2, save_every=2)
    (row,) = lines_of(tmp_path / "run" / "scores.jsonl")
    assert row["spread"] > 0


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
