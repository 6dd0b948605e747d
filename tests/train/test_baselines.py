"""The recipes beside the main one: stochastic students, encoders and two students; runs, files, command lines."""

import json
import re
import shutil
from dataclasses import replace

import command_lines
import pytest
import torch
from command_lines import assert_refused
from common import TINY, save_model, snapshot

from fastdiff import checkpoint, data, figures, rotation, samplers
from fastdiff.denoiser import Denoiser, DenoiserConfig, Guided, with_guidance
from fastdiff.errors import UserError
from fastdiff.generate import Sampling, generate
from fastdiff.losses import regression
from fastdiff.losses.batch import Batch
from fastdiff.schedule import CosineSchedule, KarrasSchedule, LinearBetaSchedule
from train import encoder, loop, stage2, two_student
from train.batches import to_device
from train.updater import Updater

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")

LIMITS = (0.0, 4.0)
TAUGHT = replace(TINY, guidance_input=True)
ROUNDS = {"start_steps": 8, "end_steps": 2, "updates": 6, "last_updates": 8, "save_every": 4, "batch_size": 16}
# name: module, its own options, which run teaches it, and what its checkpoints say
RECIPES = {
    "stochastic": (stage2, {"sampler": "stochastic"}, "stage1", ("stage2", "stochastic", LIMITS)),
    "encoder": (encoder, {}, "stage1", ("encoder", "encode", LIMITS)),
    "two_student": (two_student, {"guidance": 1.0}, "teacher", ("two_student", "ddim", (1.0, 1.0))),
}
COMMANDS = {"stochastic": ["stage2", "--sampler", "stochastic"], "encoder": ["encoder"], "two_student": ["two_student"]}
every_recipe = pytest.mark.parametrize("name", RECIPES)


def train(name, of, out, **changes):
    module, own, _, _ = RECIPES[name]
    return module.train(module.Options(teacher=of, out=out, device="cpu", **(ROUNDS | own | changes)))


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory):
    """A run of each recipe, 8 -> 4 -> 2 steps. Read it only."""
    folder = tmp_path_factory.mktemp("baselines")
    for name, (_, _, of, _) in RECIPES.items():
        train(name, getattr(runs, of), folder / name)
    return folder


@pytest.fixture
def updates(monkeypatch):
    """The number of updates so far, as the length of a list."""
    done, update = [], Updater.update

    def counted(self, batch):
        done.append(self.options.out.name)
        return update(self, batch)

    monkeypatch.setattr(Updater, "update", counted)
    return done


class Constant(torch.nn.Module):
    """A network with one output, whatever it is given."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, z, *_):
        return torch.full_like(z, self.output)


# --- runs ---


@every_recipe
def test_every_round_is_a_checkpoint_that_says_what_it_is_for(made, name):
    kind, sampler, limits = RECIPES[name][3]
    assert sorted(path.name for path in (made / name).iterdir() if path.is_dir()) == ["steps-2", "steps-4"]
    for steps in (4, 2):
        said = json.loads((made / name / f"steps-{steps}" / "model.json").read_text())
        assert (said["kind"], said["sampler"], said["steps"]) == (kind, sampler, steps)
        assert said["guidance_range"] == list(limits) and said["unet"]["guidance_input"] == (limits == LIMITS)
        assert said["class_names"] == list("0123456789")
        assert all(value.isfinite().all() for value in checkpoint.load(made / name / f"steps-{steps}").parameters())
    rows = [json.loads(line) for line in (made / name / "metrics.jsonl").read_text().splitlines()]
    assert [(row["run"], row["update"]) for row in rows] == [("steps-4", 6), ("steps-2", 8)]
    assert json.loads((made / name / "config.json").read_text())["options"]["end_steps"] == 2


@pytest.mark.parametrize(("name", "sampler", "calls"), [("stochastic", "stochastic", 1), ("two_student", "ddim", 2)])
def test_students_make_images_in_their_steps(made, name, sampler, calls):
    model = with_guidance(checkpoint.load(made / name / "steps-4"))
    images = next(generate(model, 3, Sampling(guidance=1.0, steps=4, sampler=sampler)))
    assert images.shape == (3, 1, 8, 8) and images.isfinite().all()
    assert model.network_rows == 3 * 4 * calls


def test_two_students_know_the_strength_that_they_were_trained_for(run, made, tmp_path, runs):
    of = made / "two_student/steps-4"
    assert isinstance(with_guidance(checkpoint.load(of)), Guided)
    for w, warned in ((1, False), (2, True), (0, True)):
        result = run("sample", "--checkpoint", of, "--guidance", w, "--num", 2, "--out", f"w{w}.png", "--device", "cpu")
        assert result.code == 0 and bool(result.err) == warned
        assert not warned or (f"guidance {w} is outside [1, 1]" in result.err and result.err.startswith("warning: "))
    for w in (0.0, 2.0):
        with pytest.raises(UserError, match="two_student/steps-4 was trained for w = 1: use --guidance 1, got"):
            train("two_student", of, tmp_path / "run", start_steps=4, end_steps=1, guidance=w)


def test_an_encoder_makes_noise_in_its_steps(made):
    model = checkpoint.load(made / "encoder" / "steps-4")
    images = data.to_float(torch.from_numpy(data.load("digits", "test").images[:3]))
    noise = samplers.encode(model, images, torch.arange(3), 1.0, 4, schedule=model.schedule)
    assert noise.shape == images.shape and noise.isfinite().all() and model.network_rows == 3 * 4


@every_recipe
@pytest.mark.parametrize("where", ["between the rounds", "in the last round"])
def test_an_interrupted_run_ends_with_the_weights_of_a_whole_one(
    runs, made, tmp_path, monkeypatch, updates, name, where
):
    of, out, save, preview = getattr(runs, RECIPES[name][2]), tmp_path / "run", checkpoint.save, loop.preview

    def interrupting(real, stop):
        def function(*args, **kwargs):
            result = real(*args, **kwargs)
            if stop(*args):
                raise KeyboardInterrupt
            return result

        return function

    if where == "between the rounds":
        monkeypatch.setattr(checkpoint, "save", interrupting(save, lambda folder, *_: folder.name == "steps-4"))
    else:
        at = "samples-steps-2-0000004.png"
        monkeypatch.setattr(loop, "preview", interrupting(preview, lambda _, path, *__: path.name == at))
    with pytest.raises(KeyboardInterrupt):
        train(name, of, out)
    assert len(updates) == (6 if where == "between the rounds" else 6 + 4)
    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(loop, "preview", preview)
    train(name, of, out, resume=True)
    assert len(updates) == 6 + 8
    for steps in (4, 2):
        found, whole = (folder / f"steps-{steps}" / "model.safetensors" for folder in (out, made / name))
        assert found.read_bytes() == whole.read_bytes()
    assert not list(out.glob("checkpoint-*"))


def test_one_stochastic_step_is_learned_already(made, tmp_path, updates):
    """The round from 2 steps to 1 trained for nothing: its target is what its teacher, of which it is a copy, says."""
    teacher = checkpoint.load(made / "stochastic" / "steps-2")
    ids = torch.arange(32)
    images = data.to_float(torch.from_numpy(data.load("digits").images[:32]))
    batch = Batch(images, ids % 10, ids, seed=0)
    loss = {
        steps: regression.stage2(teacher, teacher, batch, steps=steps, guidance_range=LIMITS, sampler="stochastic")
        for steps in (1, 2)
    }
    assert loss[1].max() < 1e-10 < 1e-4 < loss[2].mean()
    train("stochastic", made / "stochastic" / "steps-2", tmp_path / "run", start_steps=2, end_steps=1)
    assert not updates
    student = checkpoint.load(tmp_path / "run" / "steps-1")
    assert (student.config.kind, student.config.sampler, student.config.steps) == ("stage2", "stochastic", 1)
    for found, known in zip(student.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(found, known)
    train("stochastic", made / "stochastic" / "steps-2", tmp_path / "run", start_steps=2, end_steps=1, resume=True)


@every_recipe
def test_a_finished_run_is_left_as_it_is(runs, made, updates, name):
    before = snapshot(made / name)
    last = train(name, getattr(runs, RECIPES[name][2]), made / name, resume=True)
    after = snapshot(made / name)
    before.pop("config.json"), after.pop("config.json")
    assert not updates and before == after and last.config.steps == 2


@every_recipe
def test_a_round_of_another_run_is_a_teacher(made, tmp_path, name):
    of = made / name / "steps-4"
    train(name, of, tmp_path / "run", start_steps=4, end_steps=1)
    assert checkpoint.load(tmp_path / "run/steps-1").config.sampler == RECIPES[name][3][1]
    found, whole = (folder / "steps-2/model.safetensors" for folder in (tmp_path / "run", made / name))
    assert found.read_bytes() == whole.read_bytes()
    with pytest.raises(UserError, match="--start-steps 4"):
        train(name, of, tmp_path / "other", start_steps=16)


@every_recipe
def test_the_loss_falls(tmp_path, name):
    """One round from a random teacher, whose steps are far from straight; measured on images not trained on."""
    kind = RECIPES[name][2]
    save_model(
        tmp_path / "teacher",
        unet=TINY if kind == "teacher" else TAUGHT,
        kind=kind,
        guidance_range=None if kind == "teacher" else LIMITS,
    )
    student = train(
        name,
        tmp_path / "teacher",
        tmp_path / "run",
        start_steps=4,
        updates=50,
        last_updates=50,
        save_every=1000,
        warmup=0,
        batch_size=16,
        lr=1e-2,
    )
    taught = checkpoint.load(tmp_path / "teacher")
    batch = to_device(next(data.Batches(data.load("digits", "test"), 256, seed=7)), 10, 7, torch.device("cpu"))
    loss = {
        "stochastic": lambda model: regression.stage2(
            model, taught, batch, steps=2, guidance_range=LIMITS, sampler="stochastic"
        ),
        "encoder": lambda model: regression.encoder(model, taught, batch, steps=2, guidance_range=LIMITS),
        "two_student": lambda model: regression.two_student(model, taught, batch, steps=2, guidance=1.0),
    }[name]
    with torch.no_grad():
        before, after = loss(taught).mean(), loss(student).mean()
    assert after < 0.5 * before, (before, after)


@pytest.mark.parametrize("name", ["stochastic", "encoder"])
def test_models_without_classes_need_no_first_stage(tmp_path, name):
    save_model(tmp_path / "teacher", unet=replace(TINY, num_classes=0, image_channels=3))
    command_lines.write_images(tmp_path / "images", count=20, classes=())
    last = train(name, tmp_path / "teacher", tmp_path / "run", data=str(tmp_path / "images"))
    assert last.num_classes == 0 and last.config.guidance_range is None
    assert (last.config.kind, last.config.sampler) == RECIPES[name][3][:2]


@pytest.mark.parametrize(
    ("name", "loss", "change", "said"),
    [
        ("stochastic", "stage2", {}, {"sampler": "stochastic", "guidance_range": LIMITS, "weight": "snr_trunc"}),
        ("encoder", "encoder", {"weight": "v"}, {"guidance_range": LIMITS, "weight": "v"}),
        ("two_student", "two_student", {"guidance": 3.0}, {"guidance": 3.0, "weight": "snr_trunc"}),
    ],
)
def test_the_loss_is_the_one_that_was_asked_for(runs, tmp_path, monkeypatch, name, loss, change, said):
    seen, real = [], getattr(regression, loss)

    def spy(student, teacher, batch, **how):
        seen.append((how.pop("steps"), teacher.config.steps, how))
        return real(student, teacher, batch, steps=seen[-1][0], **how)

    monkeypatch.setattr(regression, loss, spy)
    train(name, getattr(runs, RECIPES[name][2]), tmp_path / "run", updates=1, last_updates=1, **change)
    assert seen == [(4, None, said), (2, 4, said)]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("stochastic", {"sampler": "ddim"}, "--sampler was stochastic, is ddim"),
        ("two_student", {"guidance": 2.0}, "--guidance was 1.0, is 2.0"),
        ("encoder", {"start_steps": 16}, "--start-steps was 8, is 16"),
        ("encoder", {"weight": "v"}, "--weight was snr_trunc, is v"),
    ],
)
def test_a_run_goes_on_with_its_own_options_alone(runs, made, name, change, said):
    before = snapshot(made / name)
    with pytest.raises(UserError, match=said):
        train(name, getattr(runs, RECIPES[name][2]), made / name, resume=True, **change)
    assert snapshot(made / name) == before


@every_recipe
def test_a_run_cannot_replace_its_own_teacher(runs, name):
    of = getattr(runs, RECIPES[name][2])
    before = snapshot(of)
    with pytest.raises(UserError, match="holds the teacher"):
        train(name, of, of, overwrite=True)
    assert snapshot(of) == before


def test_pictures_on_the_way_are_made_with_the_students_sampler(runs, tmp_path, monkeypatch):
    grids = []
    monkeypatch.setattr(figures, "save_grid", lambda images, path, **_: grids.append((path.name, images.clone())))
    student = train("stochastic", runs.stage1, tmp_path / "run", end_steps=4)
    name, images = grids[-1]
    assert name == "samples-steps-4-0000006.png"
    labels, ids = torch.arange(10).repeat_interleave(10), torch.arange(10).repeat(10)
    sampling = Sampling(guidance=1.0, steps=4, sampler="stochastic")
    expected = next(generate(student, labels, sampling, noise_ids=ids))
    torch.testing.assert_close(images, expected)


# --- command lines ---


@every_recipe
def test_a_command_makes_the_rounds(run, runs, name):
    of = getattr(runs, RECIPES[name][2])
    line = ["--teacher", of, "--start-steps", 4, "--end-steps", 2, "--last-updates", 2, "--batch-size", 8, "--out", "o"]
    result = run(*COMMANDS[name], *line, "--device", "cpu")
    assert result.code == 0, result.err
    config = checkpoint.load("o/steps-2").config
    assert (config.kind, config.sampler, config.guidance_range) == RECIPES[name][3]
    assert_refused(run(*COMMANDS[name], *line, "--device", "cpu"), "o already holds a run", "--resume", "--overwrite")


@every_recipe
def test_a_dry_run_writes_nothing(run, runs, tmp_path, name):
    result = run(
        *COMMANDS[name],
        "--teacher",
        getattr(runs, RECIPES[name][2]),
        "--start-steps",
        8,
        "--end-steps",
        2,
        "--out",
        "o",
        "--device",
        "cpu",
        "--dry-run",
    )
    assert result.code == 0 and not result.err, result.err
    assert "8 -> 4 steps: 2000" in result.out and "4 -> 2 steps: 4000" in result.out and "memory" in result.out
    assert not list(tmp_path.iterdir())


def test_the_memory_of_two_students_counts_both_rows_of_an_image(run, runs):
    """An update puts each image through the network with its class and without."""
    line = ["--start-steps", 8, "--end-steps", 2, "--out", "o", "--device", "cpu", "--dry-run"]
    said = {}
    for name, batch in (("two_student", 256), ("encoder", 512)):
        of = getattr(runs, RECIPES[name][2])
        out = run(*COMMANDS[name], "--teacher", of, "--batch-size", batch, *line).out
        assert f"batch        {batch} images" in out
        said[name] = float(re.search(r"activations ([\d.e+-]+)", out)[1])
    assert said["two_student"] == pytest.approx(said["encoder"], rel=0.01) and said["two_student"] > 0


STAGE1 = {"kind": "stage1", "guidance_range": LIMITS}
DETERMINISTIC = {"kind": "stage2", "guidance_range": LIMITS, "steps": 8}
STOCHASTIC = DETERMINISTIC | {"sampler": "stochastic"}
ENCODER = {"kind": "encoder", "guidance_range": LIMITS, "sampler": "encode", "steps": 8}
TWO = {"kind": "two_student", "steps": 8, "unet": TINY}
UNLABELLED = {"unet": replace(TINY, num_classes=0)}


@pytest.mark.parametrize(
    ("command", "of", "said"),
    [
        (["stage2"], ENCODER, ["is an encoder", "takes a stage-1 model, a stage-2 model"]),
        (COMMANDS["stochastic"], ENCODER, ["is an encoder", "takes a stage-1 model, a stage-2 model"]),
        (["stage2"], TWO, ["is a pair of students", "takes a stage-1 model, a stage-2 model"]),
        (COMMANDS["stochastic"], {"unet": TINY}, ["python -m train.stage1 --teacher of"]),
        (COMMANDS["stochastic"], DETERMINISTIC, ["ddim sampler", "--sampler ddim", "stage-1"]),
        (["stage2"], STOCHASTIC, ["stochastic sampler", "--sampler stochastic", "stage-1"]),
        (["encoder"], DETERMINISTIC, ["is a stage-2 model", "takes a stage-1 model"]),
        (["encoder"], STOCHASTIC, ["is a stage-2 model", "takes a stage-1 model"]),
        (["encoder"], {"unet": TINY}, ["is a class-conditional teacher", "takes a stage-1 model"]),
        (["encoder"], TWO, ["is a pair of students", "takes a stage-1 model"]),
        (["encoder"], UNLABELLED | {"kind": "stage2", "steps": 8}, ["is a stage-2 model"]),
        (["two_student"], STAGE1, ["is a stage-1 model", "takes a class-conditional teacher"]),
        (["two_student"], DETERMINISTIC, ["is a stage-2 model", "takes a class-conditional teacher"]),
        (["two_student"], ENCODER, ["is an encoder", "takes a class-conditional teacher"]),
        (["two_student"], UNLABELLED, ["unconditional", "class-conditional", "takes a class-conditional teacher"]),
    ],
)
def test_a_teacher_of_the_wrong_kind_is_refused(run, command, of, said):
    save_model("of", **{"unet": TAUGHT} | of)
    result = run(*command, "--teacher", "of", "--start-steps", 8, "--out", "o", "--device", "cpu")
    assert_refused(result, "of ", *said)
    shutil.rmtree("of")
    assert_refused(run(*command, "--teacher", "of", "--out", "o", "--device", "cpu"), "there is no checkpoint at of")


@pytest.mark.parametrize(
    ("noise", "start", "end", "gain"),
    [(CosineSchedule(), 64, 8, 4297), (CosineSchedule(), 512, 256, 135), (KarrasSchedule(), 8, 1, 500)],
)
def test_an_encoder_that_would_multiply_its_errors_is_refused(run, noise, start, end, gain):
    """x̂ is divided by sin φ in v, and φ is tiny at the image."""
    save_model("of", unet=TAUGHT, schedule=noise, parameterization="x", **STAGE1)
    steps = ["--start-steps", start, "--end-steps", end]
    result = run("encoder", "--teacher", "of", *steps, "--out", "o", "--device", "cpu")
    assert_refused(result, "of predicts x", f"one of {end} steps", f"error by {gain}:", "predicts v")


@pytest.mark.parametrize("noise", [CosineSchedule(), KarrasSchedule(), LinearBetaSchedule()])
@pytest.mark.parametrize("parameterization", ["v", "eps", "edm", "x"])
def test_the_gain_of_an_encoder_is_what_a_wrong_output_does_to_a_step(noise, parameterization):
    denoiser = Denoiser(DenoiserConfig(TINY, noise, parameterization), network=Constant(0.0))
    z, steps, moved = torch.zeros(1, 1, 8, 8), 8, []
    for i in range(steps):  # one step of the sampler at a time, with an output that is 0 and one that is 0.01 off
        start, end = (torch.tensor([noise.angle(j / steps)], dtype=torch.float64) for j in (i, i + 1))
        found = []
        for denoiser.network.output in (0.0, 0.01):
            found.append(rotation.rotate(z, denoiser(z, start), start - end))
        moved.append(float((found[1] - found[0]).abs().max()) / 0.01)
    assert encoder.error_gain(denoiser.config, steps) == pytest.approx(max(moved), rel=1e-4)
    assert (max(moved) <= 1) == (parameterization != "x")


@pytest.mark.parametrize(
    ("command", "of"),
    [(["stage2"], DETERMINISTIC), (COMMANDS["stochastic"], STOCHASTIC), (["encoder"], ENCODER), (["two_student"], TWO)],
)
@pytest.mark.parametrize("start", [16, 4, 64])
def test_rounds_start_with_the_steps_of_the_teacher(run, tmp_path, command, of, start):
    save_model("of", **{"unet": TAUGHT} | of)
    result = run(*command, "--teacher", "of", "--start-steps", start, "--out", "o", "--device", "cpu")
    assert_refused(result, "of was trained for 8 steps", "--start-steps 8", f"got {start}")
    assert [path.name for path in tmp_path.iterdir()] == ["of"]


@every_recipe
@pytest.mark.parametrize(("start", "end"), [(64, 3), (8, 8), (4, 8), (8, 0), (12, 1), (-8, 1), (1, 1)])
def test_steps_that_halving_does_not_connect_are_refused(run, runs, tmp_path, name, start, end):
    line = ["--teacher", getattr(runs, RECIPES[name][2]), "--start-steps", start, "--end-steps", end, "--out", "o"]
    assert_refused(
        run(*COMMANDS[name], *line, "--device", "cpu"), f"--start-steps {start} --end-steps {end}", "halving"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("w", ["-1", "nan", "inf"])
def test_two_students_need_a_strength_that_makes_sense(run, runs, tmp_path, w):
    result = run("two_student", "--teacher", runs.teacher, "--guidance", w, "--out", "o", "--device", "cpu")
    assert_refused(result, "--guidance", w)
    assert not list(tmp_path.iterdir())


@every_recipe
@pytest.mark.parametrize(
    ("option", "value"), [("--updates", 0), ("--last-updates", 0), ("--lr", 0), ("--batch-size", 0)]
)
def test_numbers_without_sense_are_refused(run, runs, tmp_path, name, option, value):
    line = ["--teacher", getattr(runs, RECIPES[name][2]), "--out", "o", "--device", "cpu", option, value]
    assert_refused(run(*COMMANDS[name], *line), option, value)
    assert not list(tmp_path.iterdir())


@every_recipe
def test_data_that_do_not_fit_the_teacher_are_refused(run, runs, tmp_path, name):
    command_lines.write_images(tmp_path / "colour")
    of = getattr(runs, RECIPES[name][2])
    line = ["--teacher", of, "--data", "colour", "--batch-size", 4, "--out", "o", "--device", "cpu"]
    assert_refused(run(*COMMANDS[name], *line), "3×8×8", "1×8×8", of)
    assert not (tmp_path / "o").exists()


def test_a_sampler_that_no_student_is_trained_for_is_refused(run, runs):
    result = run("stage2", "--teacher", runs.stage1, "--sampler", "ancestral", "--out", "o", "--device", "cpu")
    assert result.code == 2 and "--sampler" in result.err and "Traceback" not in result.err
