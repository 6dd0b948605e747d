"""Students of teachers that predict ε: they predict x beside it, and can be asked what noise alone is."""

import json

import pytest
import torch
from common import TINY, randomize, save_model

from fastdiff import checkpoint, denoiser, rotation
from fastdiff.denoiser import Denoiser, DenoiserConfig, Guided
from fastdiff.errors import UserError
from fastdiff.losses import regression
from fastdiff.schedule import CosineSchedule, EvenSchedule, LinearBetaSchedule
from fastdiff.unet import UNet, UNetConfig
from train import encoder, sid, stage1, stage2, students, two_student
from train.stage1 import student_of

EPS = {"schedule": LinearBetaSchedule(), "parameterization": "eps"}
SMALL = {"updates": 2, "batch_size": 8, "device": "cpu"}
ROUNDS = {**SMALL, "start_steps": 4, "end_steps": 1, "last_updates": 2}


@pytest.mark.parametrize("patch", [1, 2])
def test_it_starts_with_the_teachers_noise_and_no_image(patch):
    config = UNetConfig((8, 8), 2, 10, channels=8, channel_mult=(1,), blocks=1, head_width=8, patch_size=patch)
    teacher = randomize(Denoiser(DenoiserConfig(config, **EPS)))
    student = student_of(teacher, (0.0, 4.0))
    assert student.config.parameterization == "eps-x" and student.config.unet.outputs == 2
    z, label, w = torch.randn(4, 2, 8, 8), torch.arange(4), torch.full((4,), 3.0)
    angle = torch.tensor([0.05, 0.5, 1.0, 1.5], dtype=torch.float64)
    with torch.no_grad():
        eps = teacher.network_output(z, angle, label, None)
        torch.testing.assert_close(student.network_output(z, angle, label, w), torch.cat([eps, 0 * eps], dim=1))
        found, sure = student(z, angle, label, w), teacher(z, angle, label)
    torch.testing.assert_close(found, eps * torch.cos(angle).float()[:, None, None, None])
    x, of_teacher = (rotation.x_from_velocity(z, v, angle) for v in (found, sure))
    known = torch.cos(angle).square().float()[:, None, None, None]
    torch.testing.assert_close(x, of_teacher * known, atol=1e-4, rtol=1e-4)


def test_every_recipe_makes_and_takes_them(tmp_path):
    labelled = save_model(tmp_path / "teacher", **EPS)
    unlabelled = UNetConfig((8, 8), 1, channels=8, channel_mult=(1,), blocks=1, head_width=8)
    plain = save_model(tmp_path / "plain", unet=unlabelled, **EPS)
    stage1.train(stage1.Options(teacher=labelled, out=tmp_path / "stage1", **SMALL))
    stage1.train(stage1.Options(teacher=plain, out=tmp_path / "plain-stage1", **SMALL))
    stage2.train(stage2.Options(teacher=tmp_path / "stage1", out=tmp_path / "stage2", **ROUNDS))
    stage2.train(stage2.Options(teacher=tmp_path / "plain-stage1", out=tmp_path / "halved", **ROUNDS))
    encoder.train(encoder.Options(teacher=tmp_path / "stage1", out=tmp_path / "encoder", **ROUNDS))
    sid.train(sid.Options(teacher=tmp_path / "stage1", out=tmp_path / "sid", score_num=8, sigma_min=0.02, **SMALL))
    two_student.train(two_student.Options(teacher=labelled, out=tmp_path / "two", **ROUNDS))
    rounds = [f"{name}/steps-{n}" for name in ("stage2", "halved", "encoder") for n in (2, 1)]
    for name in ("stage1", "plain-stage1", "sid", *rounds):
        model = checkpoint.load(tmp_path / name)
        assert model.config.parameterization == "eps-x", name
        second = model.network.conv_out.weight[1:]
        assert second.shape == (1, 8, 3, 3) and second.abs().max() > 0, name
    assert checkpoint.load(tmp_path / "two/steps-1").config.parameterization == "eps"
    with pytest.raises(ValueError, match="two"):
        Guided(checkpoint.load(tmp_path / "stage1"))


@pytest.mark.parametrize("recipe", [stage2, encoder])
def test_a_second_output_is_learned_in_stage1_alone(tmp_path, recipe):
    unlabelled = UNetConfig((8, 8), 1, channels=8, channel_mult=(1,), blocks=1, head_width=8)
    plain = save_model(tmp_path / "plain", unet=unlabelled, **EPS)
    with pytest.raises(UserError, match=r"ε alone.*train.stage1 --teacher \S+plain --out \S+stage1"):
        recipe.train(recipe.Options(teacher=plain, out=tmp_path / "halved", **ROUNDS))
    assert not (tmp_path / "halved").exists()
    student = stage1.train(stage1.Options(teacher=plain, out=tmp_path / "stage1", **SMALL))
    assert student.config.guidance_range is None and student.config.parameterization == "eps-x"
    sure = save_model(tmp_path / "sure", unet=unlabelled)
    with pytest.raises(UserError, match="unconditional and predicts v"):
        stage1.train(stage1.Options(teacher=sure, out=tmp_path / "sure-stage1", **SMALL))


@pytest.mark.parametrize(
    ("parameterization", "given", "used"),
    [
        ("eps", {}, "snr_trunc"),
        ("v", {}, "snr"),
        ("eps", {"weight": "snr"}, "snr"),
        ("eps", {"clip": False}, "snr"),  # as of latents: errors of x̂ at strong noise have no limit
    ],
)
def test_the_weight_asks_for_x_where_it_is_learned(tmp_path, monkeypatch, parameterization, given, used):
    teacher = save_model(tmp_path / "teacher", parameterization=parameterization)
    real, asked = regression.stage1, []

    def watched(*models, weight, **how):
        asked.append(weight)
        return real(*models, weight=weight, **how)

    monkeypatch.setattr(regression, "stage1", watched)
    stage1.train(stage1.Options(teacher=teacher, out=tmp_path / "stage1", **given, **SMALL))
    assert set(asked) == {used}


def test_its_errors_are_not_multiplied_where_noise_is_all():
    """Steps up to noise multiply an ε network's error by 1/cos φ, and that of two outputs by less than 1."""
    teacher = Denoiser(DenoiserConfig(TINY, parameterization="eps"))
    assert encoder.error_gain(teacher.config, 64) > 10 * encoder.error_gain(student_of(teacher, (0.0, 4.0)).config, 64)
    assert max(encoder.error_gain(student_of(teacher, (0.0, 4.0)).config, steps) for steps in (1, 2, 64)) < 1


def test_a_network_with_one_output_stays_with_it(monkeypatch, capsys):
    monkeypatch.setattr(denoiser, "NETWORKS", denoiser.NETWORKS | {"one": lambda config: UNet(TINY)})
    config = DenoiserConfig(TINY, network="one", **EPS)
    assert students.settled(config) == config
    assert "'one'" in capsys.readouterr().err
    assert students.settled(DenoiserConfig(TINY)) == DenoiserConfig(TINY)


def test_a_run_of_before_is_not_gone_on_with(tmp_path, monkeypatch):
    """Its student predicted ε alone."""
    teacher = save_model(tmp_path / "teacher", **EPS)
    options = {"teacher": teacher, "out": tmp_path / "stage1", **SMALL}
    with monkeypatch.context() as patch:
        patch.setattr(students, "settled", lambda config: config)
        stage1.train(stage1.Options(**options))
    with pytest.raises(UserError, match="--overwrite"):
        stage1.train(stage1.Options(**options | {"updates": 4}, resume=True))
    assert stage1.train(stage1.Options(**options, overwrite=True)).config.parameterization == "eps-x"


# --- how their steps lie ---


def schedules(folder, *names):
    return [checkpoint.load(folder / name).schedule for name in names]


def test_students_of_discrete_steps_take_theirs_evenly_in_the_angle(tmp_path):
    even, teacher = EvenSchedule(LinearBetaSchedule()), save_model(tmp_path / "teacher", schedule=LinearBetaSchedule())
    stage1.train(stage1.Options(teacher=teacher, out=tmp_path / "stage1", **SMALL))
    stage1.train(stage1.Options(teacher=teacher, out=tmp_path / "kept", spacing="steps", **SMALL))
    stage2.train(stage2.Options(teacher=tmp_path / "stage1", out=tmp_path / "stage2", **ROUNDS))
    stage2.train(stage2.Options(teacher=tmp_path / "kept", out=tmp_path / "stage2-kept", **ROUNDS))
    two_student.train(two_student.Options(teacher=teacher, out=tmp_path / "two", **ROUNDS))
    assert schedules(tmp_path, "stage1", "stage2/steps-2", "stage2/steps-1", "two/steps-1") == [even] * 4
    assert schedules(tmp_path, "teacher", "kept", "stage2-kept/steps-1") == [LinearBetaSchedule()] * 3


def test_so_do_those_of_unconditional_teachers_without_stage_1(tmp_path):
    plain = UNetConfig((8, 8), 1, channels=8, channel_mult=(1,), blocks=1, head_width=8)
    for name, of in {"steps": LinearBetaSchedule(), "cosine": CosineSchedule()}.items():
        teacher = save_model(tmp_path / name, unet=plain, schedule=of)
        for recipe in (stage2, encoder):
            out = tmp_path / f"{recipe.__name__}-{name}"
            recipe.train(recipe.Options(teacher=teacher, out=out, **ROUNDS | {"end_steps": 2}))
    made = schedules(
        tmp_path, *(f"train.{kind}-{of}/steps-2" for kind in ("stage2", "encoder") for of in ("steps", "cosine"))
    )
    assert made == [EvenSchedule(LinearBetaSchedule()), CosineSchedule()] * 2


@pytest.mark.parametrize("recipe", [stage1, stage2])
def test_a_run_of_before_goes_on_with_the_steps_that_it_had(tmp_path, recipe):
    unet = TINY if recipe is stage1 else UNetConfig((8, 8), 1, channels=8, channel_mult=(1,), blocks=1, head_width=8)
    teacher, out = save_model(tmp_path / "teacher", unet=unet, schedule=LinearBetaSchedule()), tmp_path / "out"
    given = {"teacher": teacher, "out": out, **(SMALL if recipe is stage1 else ROUNDS)}
    recipe.train(recipe.Options(spacing="steps", **given))
    with pytest.raises(UserError, match="--spacing was steps, is angle"):
        recipe.train(recipe.Options(resume=True, **given))
    config = json.loads((out / "config.json").read_text())
    del config["options"]["spacing"]
    (out / "config.json").write_text(json.dumps(config))
    student = recipe.train(recipe.Options(resume=True, **given))
    assert student.schedule == LinearBetaSchedule()
    assert json.loads((out / "config.json").read_text())["options"]["spacing"] == "steps"
