"""The recipes: nothing waits for the device, students start where their teachers are, rounds connect and continue."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from common import TINY, randomize, snapshot, stage2_options
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastdiff import checkpoint, data, schedule
from fastdiff.denoiser import Denoiser, DenoiserConfig, Guided, with_guidance
from fastdiff.errors import UserError
from fastdiff.generate import Sampling, generate
from fastdiff.losses import regression
from fastdiff.unet import UNetConfig
from train import loop, rounds, stage1, stage2, teacher
from train.batches import to_device
from train.options import LoopOptions
from train.updater import Updater

META = torch.device("meta")
RESUME = {"device": "cpu", "resume": True}


def count_updates(monkeypatch):
    calls = []
    update = Updater.update

    def counted(self, batch):
        calls.append(self.options.out.name)
        return update(self, batch)

    monkeypatch.setattr(Updater, "update", counted)
    return calls


# --- on the meta device, which holds no values: waiting for one, branching on one, or leaving the device raises ---

ARCHITECTURE = UNetConfig(
    (16, 16), 3, 10, channels=16, channel_mult=(1, 2), blocks=1, attention_resolutions=(8,), head_width=16, dropout=0.1
)
KINDS = [("v", schedule.CosineSchedule()), ("eps", schedule.LinearBetaSchedule()), ("edm", schedule.KarrasSchedule())]


def models_on(device, parameterization, chosen):
    """A teacher, a stage-1 student and a stage-2 student; only their construction is told the device."""
    with device:
        made = Denoiser(DenoiserConfig(ARCHITECTURE, chosen, parameterization))
        first = stage1.student_of(made, (0.0, 4.0))
        second = stage1.student_of(made, (0.0, 4.0))
    second.config = replace(second.config, kind="stage2", steps=4)
    return made, first, second


def batch_on(device):
    ids = torch.arange(8)
    return to_device(data.Batch(torch.zeros(8, 3, 16, 16, dtype=torch.uint8), ids % 10, ids), 10, 1, device)


def test_a_batch_moves_to_its_device():
    batch = batch_on(META)
    assert batch.x.device == batch.label.device == batch.sample_ids.device == META
    assert batch.x.dtype == torch.float32 and batch.x.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture(
    params=[
        "meta",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(), reason="needs a GPU; on the meta device every wait raises, too"
            ),
        ),
    ]
)
def where_waiting_raises(request):
    """A device: one without values, or CUDA told to raise when it is waited for."""
    device = torch.device(request.param)
    yield device
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ("teacher", 0),
        ("teacher", 2),
        ("stage1", 1),
        ("stage2", 0),
        ("stage2", 2),
        ("stochastic", 0),
        ("encoder", 0),
        ("two_student", 1),
    ],
)
def test_an_update_never_waits_for_the_device(where_waiting_raises, recipe, kind, tmp_path):
    device = where_waiting_raises
    made, first, second = models_on(device, *KINDS[kind])
    limits = (0.0, 4.0)
    rounds_of = {"steps": 4, "guidance_range": limits}
    model, loss = {
        "teacher": (made, lambda model, batch: regression.teacher(model, batch)),
        "stage1": (first, lambda model, batch: regression.stage1(model, Guided(made), batch, guidance_range=limits)),
        "stage2": (second, lambda model, batch: regression.stage2(model, first, batch, **rounds_of)),
        "stochastic": (
            second,
            lambda model, batch: regression.stage2(model, first, batch, sampler="stochastic", **rounds_of),
        ),
        "encoder": (second, lambda model, batch: regression.encoder(model, first, batch, **rounds_of)),
        "two_student": (made, lambda model, batch: regression.two_student(model, made, batch, steps=4, guidance=1.0)),
    }[recipe]
    options = LoopOptions(out=tmp_path, batch_size=8, accumulate=2, ema=0.999, clip_norm=1.0, weight_decay=0.1)
    updater = Updater(options, model, loss)
    batch = batch_on(device)
    if device.type == "cuda":
        updater.update(batch)  # compiles and chooses
        torch.cuda.set_sync_debug_mode("error")
    before = updater.update_count
    updater.update(batch)
    assert updater.update_count == before + 1
    assert {value.device.type for value in (updater.loss_sum, updater.grad_norm, updater.first_bad)} == {device.type}


@pytest.mark.parametrize(("parameterization", "chosen"), KINDS, ids=lambda value: str(value)[:6])
def test_a_sampler_step_never_waits_for_the_device(parameterization, chosen):
    made, _, second = models_on(META, parameterization, chosen)
    for model, guidance in [(Guided(made), 1.0), (Guided(made), torch.ones(4, device=META)), (second, 1.0)]:
        images = next(generate(model, 4, Sampling(guidance=guidance, steps=1)))
        assert images.device == META and images.shape == (4, 3, 16, 16) and images.dtype == torch.float32


# --- teacher ---


def test_the_teacher_fits_its_data(runs):
    config = checkpoint.load(runs.teacher).config
    assert config.kind == "teacher" and config.guidance_range is None and config.steps is None
    assert config.unet == TINY and config.class_names == tuple("0123456789")


def test_the_teacher_learns(tmp_path):
    options = teacher.Options(
        out=tmp_path / "run", unet=TINY, updates=100, warmup=0, batch_size=32, log_every=5, device="cpu"
    )
    teacher.train(options)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]


@pytest.mark.parametrize("value", [1.0, -0.1])
def test_label_drop_outside_its_range_is_refused(tmp_path, value):
    with pytest.raises(UserError, match="--label-drop"):
        teacher.train(teacher.Options(out=tmp_path / "run", label_drop=value, device="cpu"))


# --- stage 1 ---


@pytest.fixture(scope="module")
def random_teacher(tmp_path_factory):
    """A teacher with random weights, in which labels matter and guidance therefore is far from nothing."""
    folder = tmp_path_factory.mktemp("random") / "teacher"
    checkpoint.save(folder, randomize(Denoiser(DenoiserConfig(TINY)), scale=0.2))
    return folder


def inputs(count=6):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(count, 1, 8, 8, generator=generator)
    return z, torch.linspace(0.1, 1.5, count), torch.arange(count) % 10


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0, 4.0, 100.0])
def test_a_new_student_is_the_conditional_teacher(random_teacher, w):
    made = checkpoint.load(random_teacher)
    student = stage1.student_of(made, (0.0, 4.0)).eval()
    z, angle, label = inputs()
    found = student(z, angle, label, torch.full((6,), w))
    torch.testing.assert_close(found, made(z, angle, label), atol=1e-6, rtol=1e-5)
    assert (found - made(z, angle, (label + 1) % 10)).abs().max() > 1e-3  # else the label would not matter here
    assert student.config.kind == "stage1" and student.config.guidance_range == (0.0, 4.0)
    assert any(key.startswith("guidance_mlp.") for key in student.network.state_dict())


def test_compile_compiles_student_and_teacher_but_no_copy(runs, tmp_path, monkeypatch):
    """A frozen teacher makes as many calls as its student. A run may go on without a compiler."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    options = stage2_options(
        runs.stage1, tmp_path / "stage2", start_steps=4, end_steps=1, updates=1, last_updates=1, compile=True
    )
    stage2.train(options)
    assert len(compiled) == 4 and len(set(map(id, compiled))) == 3  # a student is the next round's teacher
    stage2.train(replace(options, compile=False, resume=True))


def test_a_student_is_a_copy(random_teacher):
    made = checkpoint.load(random_teacher)
    before = {key: value.clone() for key, value in made.state_dict().items()}
    randomize(stage1.student_of(made, (0.0, 4.0)), seed=3)
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())


def test_one_strength_needs_no_guidance_input(random_teacher):
    made = checkpoint.load(random_teacher)
    student = stage1.student_of(made, (2.0, 2.0))
    assert not student.config.unet.guidance_input and student.config.guidance_range == (2.0, 2.0)
    assert student.network.state_dict().keys() == made.network.state_dict().keys()


@pytest.mark.parametrize(("limits", "clip"), [((0.0, 4.0), False), ((2.0, 2.0), False), ((0.0, 4.0), True)])
def test_stage1_learns_the_guided_teacher(random_teacher, tmp_path, limits, clip):
    made = checkpoint.load(random_teacher)
    student = stage1.train(
        stage1.Options(
            out=tmp_path / "run",
            teacher=random_teacher,
            guidance_range=limits,
            clip=clip,
            updates=400 if clip else 80,
            warmup=0,
            ema=0.9,
            batch_size=32,
            lr=5e-3,
            device="cpu",
        )
    )
    stream = data.Batches(data.load("digits", "test"), 128, seed=7)
    batch = to_device(next(stream), 10, 7, torch.device("cpu"))
    with torch.no_grad():
        before, after = (
            regression.stage1(model, Guided(made), batch, guidance_range=limits, clip=1.0 if clip else None).mean()
            for model in (stage1.student_of(made, limits).eval(), student)
        )
    assert after < 0.5 * before
    saved = checkpoint.load(tmp_path / "run").config
    assert saved.kind == "stage1" and saved.guidance_range == limits and saved.steps is None


@pytest.mark.parametrize("limits", [(-1.0, 4.0), (3.0, 1.0)])
def test_stage1_refuses_a_range_without_sense(runs, tmp_path, limits):
    with pytest.raises(UserError, match="--guidance-range"):
        stage1.train(stage1.Options(out=tmp_path / "run", teacher=runs.teacher, guidance_range=limits, device="cpu"))


# --- stage 2 ---


@given(end=st.integers(1, 1000), halvings=st.integers(1, 13))
def test_halving_connects_powers_of_two_times_a_common_factor(end, halvings):
    start = end << halvings
    assert rounds.student_steps(start, end) == [start >> k for k in range(1, halvings + 1)]


@given(start=st.integers(-10, 5000), end=st.integers(-10, 300))
@example(64, 64)
@example(0, 0)
@example(64, 0)
@example(96, 1)
@example(-8, -2)
def test_halving_refuses_what_it_cannot_connect(start, end):
    if end > 0 and start > end and start % end == 0 and (start // end).bit_count() == 1:
        assert rounds.student_steps(start, end)[-1] == end
    else:
        with pytest.raises(UserError, match=f"--start-steps {start} --end-steps {end}:"):
            rounds.student_steps(start, end)


def test_the_last_two_rounds_are_longer(tmp_path):
    options = stage2.Options(teacher=tmp_path, out=tmp_path, updates=5)
    assert [rounds.round_updates(options, n) for n in (8, 4, 3, 2, 1)] == [5, 5, 5, 10, 10]
    options = replace(options, last_updates=7)
    assert [rounds.round_updates(options, n) for n in (8, 4, 3, 2, 1)] == [5, 5, 5, 7, 7]
    options = replace(options, sampler="stochastic")
    assert [rounds.round_updates(options, n) for n in (8, 4, 3, 2, 1)] == [5, 5, 5, 7, 0]


def test_every_round_is_a_checkpoint(runs):
    folders = sorted(path.name for path in runs.stage2.iterdir() if path.is_dir() and path.name != "tensorboard")
    assert folders == ["steps-1", "steps-2"]
    for steps in (2, 1):
        model = checkpoint.load(runs.stage2 / f"steps-{steps}")
        config = model.config
        assert (config.kind, config.sampler, config.steps, config.guidance_range) == ("stage2", "ddim", steps, (0, 4))
        assert config.unet.guidance_input and config.class_names == tuple("0123456789")
        images = next(generate(with_guidance(model), 4, Sampling(guidance=1.0, steps=steps)))
        assert images.isfinite().all() and model.network_rows == 4 * steps
    rows = [json.loads(line) for line in (runs.stage2 / "metrics.jsonl").read_text().splitlines()]
    assert [(row["run"], row["update"]) for row in rows] == [("steps-2", 8), ("steps-1", 8)]


def test_each_round_starts_from_the_one_before(runs, tmp_path, monkeypatch):
    """With a learning rate near 0 every student stays what stage 1 made."""
    stage2.train(stage2_options(runs.stage1, tmp_path / "run", lr=1e-12))
    first, last = checkpoint.load(runs.stage1), checkpoint.load(tmp_path / "run" / "steps-1")
    for key, value in first.network.state_dict().items():
        torch.testing.assert_close(last.network.state_dict()[key], value, atol=1e-9, rtol=0)
    seen = []
    real = regression.stage2

    def spy(model, teacher, batch, **kwargs):
        if not seen or seen[-1][0] != kwargs["steps"]:
            seen.append((kwargs["steps"], teacher.config.steps, kwargs["guidance_range"]))
        return real(model, teacher, batch, **kwargs)

    monkeypatch.setattr(regression, "stage2", spy)
    stage2.train(stage2_options(runs.stage1, tmp_path / "again", updates=1, last_updates=1, start_steps=8))
    assert seen == [(4, None, (0, 4)), (2, 4, (0, 4)), (1, 2, (0, 4))]


def test_finished_rounds_are_not_repeated(runs, monkeypatch):
    before = snapshot(runs.stage2)
    calls = count_updates(monkeypatch)
    model = stage2.train(stage2_options(runs.stage1, runs.stage2, resume=True))
    after = snapshot(runs.stage2)
    before.pop("config.json"), after.pop("config.json")
    assert not calls and before == after
    assert model.config.steps == 1


def test_a_missing_round_is_made_again_and_only_that(runs, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(runs.stage2, out)
    shutil.rmtree(out / "steps-1")
    kept = snapshot(out / "steps-2")
    calls = count_updates(monkeypatch)
    stage2.train(stage2_options(runs.stage1, out, resume=True))
    assert len(calls) == 8 and snapshot(out / "steps-2") == kept
    assert (out / "steps-1/model.safetensors").read_bytes() == (runs.stage2 / "steps-1/model.safetensors").read_bytes()


def test_a_run_interrupted_inside_a_round_continues(runs, tmp_path, monkeypatch):
    out = tmp_path / "run"
    real = loop.preview

    def interrupted(denoiser, path, *args, **kwargs):
        if path.name == "samples-steps-1-0000004.png":
            raise KeyboardInterrupt
        real(denoiser, path, *args, **kwargs)

    monkeypatch.setattr(loop, "preview", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage2.train(stage2_options(runs.stage1, out))
    monkeypatch.setattr(loop, "preview", real)
    finished = snapshot(out / "steps-2")
    assert not (out / "steps-1").exists()
    calls = count_updates(monkeypatch)
    stage2.train(stage2_options(runs.stage1, out, resume=True))
    assert len(calls) == 4 and snapshot(out / "steps-2") == finished
    assert not list(out.glob("checkpoint-*"))
    assert (out / "steps-1/model.safetensors").read_bytes() == (runs.stage2 / "steps-1/model.safetensors").read_bytes()


def test_a_run_interrupted_between_two_rounds_continues(runs, tmp_path, monkeypatch):
    """The numbered checkpoints of a finished round must not hide those of the next one."""
    out, real_save, real_preview = tmp_path / "run", checkpoint.save, loop.preview
    fields = {"start_steps": 8, "end_steps": 2, "updates": 8, "last_updates": 6, "save_every": 2}

    def save(folder, *args, **kwargs):
        real_save(folder, *args, **kwargs)
        if folder.name == "steps-4":
            raise KeyboardInterrupt

    def preview(denoiser, path, *args, **kwargs):
        if path.name == "samples-steps-2-0000004.png":
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(KeyboardInterrupt):
        stage2.train(stage2_options(runs.stage1, out, **fields))
    monkeypatch.setattr(checkpoint, "save", real_save)
    monkeypatch.setattr(loop, "preview", preview)
    with pytest.raises(KeyboardInterrupt):
        stage2.train(stage2_options(runs.stage1, out, resume=True, **fields))
    monkeypatch.setattr(loop, "preview", real_preview)
    calls = count_updates(monkeypatch)
    stage2.train(stage2_options(runs.stage1, out, resume=True, **fields))
    assert len(calls) == 2
    assert (out / "steps-2").is_dir() and not list(out.glob("checkpoint-*"))


def test_stage2_continues_from_a_round_of_another_run(runs, tmp_path):
    stage2.train(stage2_options(runs.stage2 / "steps-2", tmp_path / "run", start_steps=2))
    assert checkpoint.load(tmp_path / "run" / "steps-1").config.steps == 1
    with pytest.raises(UserError, match="--start-steps 2"):
        stage2.train(stage2_options(runs.stage2 / "steps-2", tmp_path / "other", start_steps=8))


# --- data without labels ---


@settings(deadline=None)
@given(st.integers(0, 1))
def test_unconditional_losses_take_no_label(seed):
    config = DenoiserConfig(replace(TINY, num_classes=0))
    batch = to_device(next(data.Batches(unlabelled(), 8, seed=seed)), 0, seed, torch.device("cpu"))
    assert batch.label is None
    assert regression.teacher(Denoiser(config), batch).shape == (8,)


def unlabelled():
    images = np.random.default_rng(0).integers(0, 256, (8, 1, 8, 8), dtype=np.uint8)
    return data.Dataset(images, np.zeros(8, np.int64), (), "plain", "train")


def test_unconditional_data_go_from_the_teacher_to_stage2(tmp_path):
    (tmp_path / "images").mkdir()
    for index, image in enumerate(np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(image).save(tmp_path / "images" / f"{index}.png")
    common = {"data": str(tmp_path / "images"), "batch_size": 16, "updates": 4, "device": "cpu"}
    made = teacher.train(teacher.Options(out=tmp_path / "teacher", unet=TINY, **common))
    assert made.num_classes == 0 and made.image_shape == (3, 8, 8)
    with pytest.raises(UserError, match=r"unconditional.*train\.stage2"):
        stage1.train(stage1.Options(out=tmp_path / "stage1", teacher=tmp_path / "teacher", **common))
    assert not (tmp_path / "stage1").exists()
    last = stage2.train(stage2_options(tmp_path / "teacher", tmp_path / "stage2", **common))
    assert last.config.guidance_range is None and last.config.steps == 1 and last.num_classes == 0
    images = next(generate(with_guidance(last), 3, Sampling(steps=1)))
    assert images.shape == (3, 3, 8, 8) and images.isfinite().all()


def test_a_run_cannot_replace_its_own_teacher(runs):
    stage1_run = runs.stage1
    options = stage2.Options(out=stage1_run, teacher=stage1_run, batch_size=16, overwrite=True, device="cpu")
    before = sorted(p.name for p in stage1_run.rglob("*"))
    with pytest.raises(UserError, match="holds the teacher"):
        stage2.train(options)
    assert sorted(p.name for p in stage1_run.rglob("*")) == before


@pytest.mark.parametrize("recipe", ["stage1", "stage2"])
def test_a_run_does_not_go_on_with_another_teacher(runs, tmp_path, recipe):
    """One that was replaced, or that trained on meanwhile, was once accepted."""
    of = {"stage1": "teacher", "stage2": "stage1"}[recipe]
    folder, out = tmp_path / of, tmp_path / recipe
    shutil.copytree(getattr(runs, of), folder)
    shutil.copytree(getattr(runs, recipe), out)
    train, make = {
        "stage1": (stage1.train, lambda: stage1.Options(out=out, teacher=folder, updates=20, batch_size=16, **RESUME)),
        "stage2": (stage2.train, lambda: stage2_options(folder, out, resume=True)),
    }[recipe]
    train(make())
    model = checkpoint.load(folder)
    (newest,) = sorted(folder.glob("checkpoint-*"))[-1:]
    with torch.no_grad():
        next(model.parameters()).flatten()[0] += 1e-6
    checkpoint.save(newest.with_name("checkpoint-0001000"), model)
    before = snapshot(out)
    with pytest.raises(UserError, match=f"cannot resume {out}.* the teacher {folder} has other weights"):
        train(make())
    assert snapshot(out) == before
    old = json.loads((out / "config.json").read_text())
    assert len(old.pop("teacher_sha256")) == 64
    (out / "config.json").write_text(json.dumps(old))
    train(make())  # a run of before the hash was kept


def test_the_hash_of_weights_sees_names_shapes_and_values_alone(random_teacher):
    first, model = (checkpoint.load(random_teacher) for _ in range(2))
    known = first.weights_sha256()
    assert model.to(memory_format=torch.contiguous_format).weights_sha256() == known
    with torch.no_grad():
        next(model.parameters()).flatten()[0] += 1
    assert model.weights_sha256() != known
    smaller = replace(first.config.unet, num_classes=9)
    assert Denoiser(replace(first.config, unet=smaller)).weights_sha256() != known
