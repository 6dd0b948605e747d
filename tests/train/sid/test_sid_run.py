"""What a run of SiD leaves, and how others use its checkpoints."""

import json
import math
from dataclasses import replace
from pathlib import Path

import command_lines
import pytest
import torch
from command_lines import assert_refused
from sid_runs import REAL_PREVIEW, lines_of, make_options, train

import kernels
from fastdiff import checkpoint
from fastdiff.denoiser import with_guidance
from fastdiff.errors import UserError
from fastdiff.generate import Sampling, generate
from fastdiff.losses import sid
from train import encoder, stage1, stage2, two_student
from train import sid as recipe

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


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
