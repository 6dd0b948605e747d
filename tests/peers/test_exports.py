"""`fastdiff export`: what others' runtimes make of an export, against `generate`, and what is refused."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import assert_refused, elsewhere, run  # noqa: F401
from common import TINY, save_model, snapshot
from torch import nn

from fastdiff import checkpoint, data, denoiser
from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.exports import compare, onnx
from fastdiff.exports.generator import Generator
from fastdiff.generate import Sampling, generate
from fastdiff.schedule import EvenSchedule, KarrasSchedule, LinearBetaSchedule
from fastdiff.unet import UNetConfig

STUDENT = {"kind": "stage2", "guidance_range": (0.0, 4.0), "steps": 3}
UNCONDITIONAL = {"unet": {"num_classes": 0}}
OF_NOISE = {"parameterization": "eps-x", "schedule": LinearBetaSchedule(), "time": "step", "unet": {"outputs": 2}}
KINDS = {  # changes of TINY under "unet", the rest of DenoiserConfig
    "stage1": {"kind": "stage1", "guidance_range": (0.0, 4.0)},
    "stage2": STUDENT,
    "stochastic": STUDENT | {"sampler": "stochastic"},
    "sid": STUDENT | {"kind": "sid", "steps": 1, "sampler": "one_step", "sigma_init": 2.5},
    "two_student": {"kind": "two_student", "guidance_range": (1.0, 1.0), "steps": 2},
    "teacher": {},
    "unconditional": UNCONDITIONAL,
    "unconditional stochastic": UNCONDITIONAL | {"kind": "stage2", "steps": 3, "sampler": "stochastic"},
}
MORE_KINDS = {
    "of steps": {"parameterization": "eps", "schedule": LinearBetaSchedule(), "time": "step"},
    "EDM": {"parameterization": "edm", "schedule": KarrasSchedule()},
    "x": STUDENT | {"parameterization": "x"},
    "ε and x": STUDENT | OF_NOISE,
    "ε and x, steps even in the angle": STUDENT | OF_NOISE | {"schedule": EvenSchedule(LinearBetaSchedule())},
    "ε and x, stochastic": STUDENT | OF_NOISE | {"sampler": "stochastic"},
    "pair": {"unet": {"null_class": False}, "unconditional": replace(TINY, num_classes=0)},
    "without a null class": {"unet": {"null_class": False}},
}
RICH = UNetConfig(  # which a UNet2DModel can be, too
    (16, 16), 3, 5, channels=16, channel_mult=(1, 2), blocks=1, groups=4, attention_resolutions=(8,), head_width=8
)
SMALL = {"unet": {"num_classes": 5, "image_channels": 1, "image_size": (4, 6)}, "network": "small"}


class Small(nn.Module):
    """A network of one's own, quickly traced."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.classes, channels = config.num_classes, config.image_channels
        self.time = nn.Linear(1, 4)
        self.label = nn.Embedding(config.num_classes + 1, 4)
        self.first = nn.Conv2d(channels + 4, 8, 3, padding=1)
        self.last = nn.Conv2d(8, config.outputs * channels, 3, padding=1)
        if config.guidance_input:
            self.guidance = nn.Linear(1, 4)

    def forward(self, z, time, label, guidance):
        h = self.time(time[:, None])
        if label is not None:
            h = h + self.label(label)
        if guidance is not None:
            h = h + self.guidance(guidance[:, None])
        h = torch.cat([z, h[:, :, None, None].expand(-1, -1, *z.shape[2:])], dim=1)
        return self.last(torch.tanh(self.first(h)))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(denoiser.NETWORKS, "small", Small)


def config_of(config: dict, unet: UNetConfig = TINY) -> dict:
    """For `save_model`: the changes of a U-Net applied, with an input for w where the model is one of w."""
    config = dict(config)
    inside = "guidance_range" in config and config["kind"] != "two_student"
    return config | {"unet": replace(unet, **config.pop("unet", {}), guidance_input=inside)}


def small_of(config: dict) -> dict:
    return config_of(config | SMALL | {"unet": SMALL["unet"] | config.get("unet", {})})


def expected(folder: Path, given: dict[str, torch.Tensor], *, seed: int, **changes) -> torch.Tensor:
    """What `generate` makes of a checkpoint, float32."""
    labels = given.get("label", len(given["noise"]))
    return torch.cat(list(generate(checkpoint.load(folder), labels, Sampling(seed=seed, **changes))))


def inputs(folder: Path, *, seed: int, steps: int | None = None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """For 7 images, what an export of a checkpoint takes, and the images of `generate`."""
    model = checkpoint.load(folder)
    generator = Generator(model, Sampling(steps=steps))
    given = compare.inputs(generator, 7, seed=seed)
    return given, expected(folder, given, seed=seed, steps=steps, guidance=given.get("guidance"))


# --- The function that is exported ---


@pytest.mark.parametrize("name", [*KINDS, *MORE_KINDS])
def test_the_generator_draws_what_generate_does(name, tmp_path):
    config = (KINDS | MORE_KINDS)[name]
    folder = save_model(tmp_path / "model", **config_of(config))
    steps = None if config.get("steps") else 3
    given, images = inputs(folder, seed=5, steps=steps)
    found = Generator(checkpoint.load(folder), Sampling(steps=steps))(**given)
    assert images.std() > 0.03 and (images[0] - images[1]).abs().max() > 0.01
    torch.testing.assert_close(found, images, rtol=0, atol=1e-4 if name == "of steps" else 2e-6)


@pytest.mark.parametrize("settings", [{"sampler": "ancestral", "variance": 0.7}, {"clip": False}, {"sampler": "ddim"}])
def test_other_settings_of_the_sampler(settings, tmp_path):
    folder = save_model(tmp_path / "model", **config_of({}))
    sampling = Sampling(steps=3, **settings)
    generator = Generator(checkpoint.load(folder), sampling, guidance=1.5)
    given = compare.inputs(generator, 3, seed=1)
    assert "guidance" not in given and ("noises" in given) == ("variance" in settings)
    images = expected(folder, given, seed=1, guidance=1.5, steps=3, **settings)
    torch.testing.assert_close(generator(**given), images, rtol=0, atol=2e-6 * max(1, images.abs().max().item()))


def test_what_is_called_once_and_what_twice():
    teacher = Denoiser(DenoiserConfig(TINY))
    calls = [Generator(teacher, Sampling(steps=3), guidance=w).calls for w in (None, 0.0, 1.0)]
    assert calls == [6, 3, 6]
    student = Denoiser(DenoiserConfig(replace(TINY, guidance_input=True), **STUDENT))
    assert [Generator(student, Sampling(), guidance=w).calls for w in (None, 2.0)] == [3, 3]


# --- Formats ---


def in_onnxruntime(folder: Path, given: dict[str, torch.Tensor]) -> torch.Tensor:
    session = pytest.importorskip("onnxruntime").InferenceSession(folder / "model.onnx")
    assert {one.name for one in session.get_inputs()} == set(given)
    assert not any(isinstance(one.shape[0], int) for one in session.get_inputs())
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in given.items()})[0])


def in_torch(folder: Path, given: dict[str, torch.Tensor]) -> torch.Tensor:
    program = torch.export.load(folder / "model.pt2")
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert all(not hasattr(one, "namespace") or one.namespace == "aten" for one in called), called
    return program.module()(**given)


RUNTIMES = {"onnx": in_onnxruntime, "torch": in_torch}


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("onnx", name)
        for name in ("stage1", "stochastic", "sid", "two_student", "unconditional stochastic", "EDM", "ε and x")
    ]
    + [("torch", name) for name in ("stage2", "two_student", "unconditional stochastic", "ε and x, stochastic")],
)
def test_each_kind_draws_the_same_elsewhere(run, format, name):  # noqa: F811
    """By a small network, which is traced in a second; labels, w and noises as each kind takes them."""
    config = (KINDS | MORE_KINDS)[name]
    save_model(Path("model"), scale=0.5, **small_of(config))
    steps = () if config.get("steps") else ("--steps", 2)
    result = run("export", "model", "--format", format, "--out", "made", *steps)
    assert result.code == 0, result
    assert float(re.search(r"at most (\S+) apart", result.out)[1]) < 1e-5
    given, images = inputs(Path("model"), seed=3, steps=steps[1] if steps else None)
    names = {"noise"} | ({"label", "guidance"} if "unconditional" not in name else set())
    assert set(given) == names | ({"noises"} if "stochastic" in name else set())
    found = RUNTIMES[format](Path("made"), given)
    torch.testing.assert_close(found, images, rtol=0, atol=1e-4)
    assert images.std() > 0.05


def test_a_unet_in_onnxruntime_as_uint8(run, monkeypatch):  # noqa: F811
    """With attention and resampling; each weight is there once, and in a file of its own where they are large."""
    monkeypatch.setattr(onnx, "LARGEST", 1000)
    unet = replace(TINY, channel_mult=(1, 1), resample="conv", attention_resolutions=(4,), head_width=4)
    save_model(Path("model"), scale=0.2, **config_of(STUDENT, replace(unet, decoder_attention="last")))
    result = run("export", "model", "--format", "onnx", "--out", "made", "--uint8")
    assert result.code == 0, result
    assert sorted(path.name for path in Path("made").iterdir()) == ["README.md", "model.onnx", "model.onnx.data"]
    weights = sum(parameter.nbytes for parameter in checkpoint.load("model").parameters())
    assert 0.9 * weights <= Path("made/model.onnx.data").stat().st_size < 1.1 * weights
    given, images = inputs(Path("model"), seed=3)
    found, expected = in_onnxruntime(Path("made"), given), data.to_uint8(images)
    assert found.dtype == torch.uint8 and found.shape == expected.shape
    differences = (found.int() - expected.int()).abs()
    assert differences.max() <= 1 and (differences > 0).float().mean() < 1e-3


OUTSIDE = """
import sys
sys.modules.update(dict.fromkeys(("fastdiff", "kernels", "train", "triton")))  # each import of them raises
exec(sys.argv[1])
print(type(images).__name__, tuple(images.shape), images.dtype)
"""


def example(card: Path) -> str:
    return re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)[1]


def test_a_program_of_torch_export_runs_where_fastdiff_is_not(run):  # noqa: F811
    """As its README.md shows, in a process that cannot import fastdiff."""
    save_model(Path("model"), scale=0.1, **config_of(KINDS["sid"]))
    assert run("export", "model", "--format", "torch", "--out", "made").code == 0
    command = [sys.executable, "-c", OUTSIDE, example(Path("made/README.md"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd="made", timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Tensor (8, 1, 8, 8) torch.float32\n"


@pytest.mark.parametrize("format", ["onnx", "diffusers"])
def test_the_other_cards_show_what_runs(run, format, monkeypatch):  # noqa: F811
    save_model(Path("onnx"), **small_of(KINDS["stochastic"]))
    save_model(Path("diffusers"), scale=0.1, **config_of(STUDENT, RICH))
    w = ("--guidance", 1) if format == "diffusers" else ()
    assert run("export", format, "--format", format, "--out", "made", *w).code == 0
    monkeypatch.chdir("made")
    names = {}
    exec(example(Path("README.md")), names)
    images = np.stack(list(map(np.asarray, names["images"])))
    assert images.shape == {"onnx": (8, 1, 4, 6), "diffusers": (8, 16, 16, 3)}[format] and images.std() > 0.05


# --- diffusers ---

CONV = {"resample": "conv", "qkv_order": "head-qkv", "scale_shift": False, "time_endpoint": True}
OTHER = {"qkv_order": "head-width-qkv", "resample": "conv-asymmetric", "middle_attention": False, "head_width": None}
PIPELINES = {  # w, a change of RICH, and of the configuration
    "stage2": (1.5, {}, STUDENT),
    "stage2, one step": (4.0, {}, STUDENT | {"steps": 1, "sampler": "stochastic"}),
    "stage1": (0.5, CONV, {"kind": "stage1", "guidance_range": (0.0, 4.0)}),
    "sid": (2.0, {}, KINDS["sid"]),
    "sid of an ε teacher": (2.0, {}, KINDS["sid"] | {"parameterization": "eps"}),
    "sid of an EDM teacher": (0.0, {}, KINDS["sid"] | {"parameterization": "edm", "schedule": KarrasSchedule()}),
    "EDM, one step": (0.0, {}, STUDENT | {"steps": 1, "parameterization": "edm", "schedule": KarrasSchedule()}),
    "x, unconditional": (None, OTHER | {"num_classes": 0, "image_size": (8, 16)}, {"parameterization": "x"}),
    "teacher of steps": (0.0, {"channel_mult": (2, 2), "heads": 2}, {"schedule": LinearBetaSchedule(), "time": "step"}),
    "steps even in the angle": (1.5, {}, STUDENT | {"schedule": EvenSchedule(LinearBetaSchedule()), "time": "step"}),
    "pair": (0.0, {"null_class": False}, {"unconditional": replace(RICH, num_classes=0)}),
    "two_student": (0.0, {}, KINDS["two_student"]),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_of_diffusers_draws_the_same(run, name):  # noqa: F811
    diffusers = pytest.importorskip("diffusers")
    w, changes, config = PIPELINES[name]
    save_model(Path("model"), scale=0.1, **config_of(config | {"unet": changes}, RICH))
    steps = config.get("steps", 3)
    strength = () if w is None else ("--guidance", w)
    result = run("export", "model", "--format", "diffusers", "--out", "made", "--steps", steps, *strength)
    assert result.code == 0, result
    pipeline = diffusers.DiffusionPipeline.from_pretrained("made", low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    model = checkpoint.load("model")
    labels = {"class_labels": [0, 4, 2]} if model.num_classes else {}
    images = pipeline(
        3, **labels, generator=torch.Generator().manual_seed(7), num_inference_steps=steps, output_type="np"
    ).images
    found = 2 * torch.from_numpy(images).permute(0, 3, 1, 2) - 1
    generator = Generator(model, Sampling(steps=steps), guidance=w)
    label = {"label": torch.tensor(labels["class_labels"])} if labels else {}
    noise = torch.randn(3, *model.image_shape, generator=torch.Generator().manual_seed(7))
    expected = generator(noise=noise, **label).clamp(-1, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.05


NOT_IN_DIFFUSERS = {
    "patch_size": {"patch_size": 2},
    "label_before_mlp": {"label_before_mlp": True},
    "residual_scale": {"residual_scale": 0.5**0.5},
    "resample_skip_conv": {"resample_skip_conv": True},
    "decoder_attention": {"decoder_attention": "last"},
    "input_mult": {"input_mult": 2},
    "channel_mult": {"channel_mult": (0.5, 1)},
    "heads": {"heads": 2, "attention_resolutions": (16, 8)},
    "min_group_width": {"groups": 32},
    "image_size": {"image_size": (8, 16)},
}


@pytest.mark.parametrize("name", NOT_IN_DIFFUSERS)
def test_networks_that_diffusers_cannot_be_are_refused_by_field(run, name):  # noqa: F811
    save_model(Path("model"), **config_of(STUDENT | {"unet": NOT_IN_DIFFUSERS[name]}, RICH))
    assert_refused(run("export", "model", "--format", "diffusers", "--out", "made", "--guidance", 1), name)
    assert not Path("made").exists()


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        (STUDENT | {"sampler": "stochastic"}, ("--guidance", 1), "sampler is 'stochastic'"),
        (STUDENT | {"parameterization": "edm"}, ("--guidance", 1), "parameterization is 'edm'"),
        (STUDENT | OF_NOISE, ("--guidance", 1), "outputs is 2"),
        (STUDENT | OF_NOISE | {"steps": 1}, ("--guidance", 1), "outputs is 2"),
        ({}, ("--guidance", 1, "--steps", 2), "two calls"),
        (STUDENT, (), "--guidance"),
        (STUDENT, ("--guidance", 1, "--uint8"), "--uint8"),
        ({"network": "small", "unet": {"image_size": (5, 6)}}, ("--guidance", 0), "network is 'small'"),
    ],
)
def test_models_that_diffusers_cannot_be_are_refused(run, config, options, said):  # noqa: F811
    save_model(Path("model"), **config_of(config, RICH))
    assert_refused(run("export", "model", "--format", "diffusers", "--out", "made", *options), said)
    assert not Path("made").exists()


# --- What is refused, and what is kept ---


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        (STUDENT, ("--format", "tensorrt"), "--format tensorrt"),
        (STUDENT, ("--out", "made.onnx"), "a folder"),
        ({}, ("--steps", 65), "64"),
        ({}, ("--steps", 0), "--steps"),
        ({"kind": "encoder", "steps": 4}, (), "encoder"),
        (KINDS["sid"], ("--sampler", "ddim"), "several-step"),
        (STUDENT, ("--guidance", -1), "--guidance"),
        (UNCONDITIONAL, ("--guidance", 1), "unconditional"),
        ({"unet": {"null_class": False}}, ("--guidance", 1), "null class"),
        ({}, ("--sampler", "ancestral", "--variance", 2), "--variance"),
        (STUDENT, ("--scores", "none.json"), "none.json"),
        (STUDENT, ("--scores", "model/model.json"), "results.json"),
    ],
)
def test_bad_input_ends_before_anything_is_written(run, config, options, said):  # noqa: F811
    save_model(Path("model"), **config_of(config))
    before = snapshot(Path.cwd())
    given = options if "--format" in options else ("--format", "onnx", *options)
    given = given if "--out" in given else ("--out", "made", *given)
    assert_refused(run("export", "model", *given), said)
    assert snapshot(Path.cwd()) == before and {path.name for path in Path.cwd().iterdir()} == {"model"}


def test_nothing_of_the_users_is_overwritten(run):  # noqa: F811
    save_model(Path("model"), **small_of(KINDS["sid"]))
    export = ("export", "model", "--format", "torch", "--out", "made")
    for path in (Path("other"), Path("made")):
        path.mkdir()
        (path / "README.md").write_text("mine")
    assert_refused(run(*export, "--overwrite"), "README.md", "no part of an export")
    (Path("made") / "README.md").unlink()
    assert run(*export).code == 0
    (Path("made") / "left over").write_text("of another")
    assert_refused(run(*export, "--overwrite"), "left over")
    (Path("made") / "left over").unlink()
    before = snapshot("made")
    assert_refused(run(*export), "--overwrite")
    assert snapshot("made") == before
    assert run(*export, "--overwrite", "--licence", "mit").code == 0
    assert "mit" in Path("made/README.md").read_text()
    Path("file").write_text("mine")
    assert_refused(run(*export[:-1], "file", "--overwrite"), "is a file")
    assert not list(Path.cwd().glob(".*"))


def test_what_differs_is_not_kept(run, monkeypatch):  # noqa: F811
    save_model(Path("model"), **small_of(KINDS["sid"]))
    ours = compare.ours
    monkeypatch.setattr(compare, "ours", lambda *given: ours(*given) + 2e-4)
    assert_refused(run("export", "model", "--format", "torch", "--out", "made"), "2.0e-04 apart")
    assert not Path("made").exists() and not list(Path.cwd().glob(".*"))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_what_is_not_installed(run, monkeypatch):  # noqa: F811
    save_model(Path("model"), **small_of(KINDS["sid"]))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run("export", "model", "--format", "onnx", "--out", "made")
    assert result.code == 0 and "was not compared" in result.err and "not with" in Path("made/README.md").read_text()
    for missing, format in (("onnxscript", "onnx"), ("diffusers", "diffusers")):
        monkeypatch.setitem(sys.modules, missing, None)
        assert_refused(run("export", "model", "--format", format, "--out", "other"), missing, "fastdiff[export]")


class Branching(Small):
    def forward(self, z, time, label, guidance):
        return super().forward(z, time, label, guidance) * (2 if z.mean() > 0 else 1)


def test_a_network_that_branches_on_values_is_refused(run, monkeypatch):  # noqa: F811
    monkeypatch.setitem(denoiser.NETWORKS, "small", Branching)
    save_model(Path("model"), **small_of(KINDS["sid"]))
    assert_refused(run("export", "model", "--format", "torch", "--out", "made"), "'small'", "traced")
    assert not Path("made").exists()


# --- The card ---


def test_the_card_says_what_it_is(run):  # noqa: F811
    folder = save_model(Path("run/steps-1"), **small_of(KINDS["sid"] | {"class_names": tuple("abcde")}))
    Path("run/config.json").write_text(json.dumps({"options": {"updates": 1, "teacher": "runs/teacher"}}))
    row = {"model": "run/steps-1", "sampler": "one_step", "steps": 1, "nfe": 1.0, "guidance": 1.0, "fd": 3.21}
    row |= {"score": 2.5, "images_per_second": 9.0, "num": 1000, "seed": 0}
    reference = {"data": "digits", "split": "train", "images": 100, "extractor": "digits-classifier"}
    reference |= {"extractor_test_accuracy": 0.9, "half_against_half_fd": 0.4, "score": 8.0}
    Path("run/results.json").write_text(json.dumps({"reference": reference, "rows": [row, row | {"steps": 4}]}))
    result = run("export", "run/steps-1", "--format", "torch", "--out", "made", "--guidance", 1)
    assert result.code == 0, result
    card = Path("made/README.md").read_text()
    sha256 = json.loads((folder / "manifest.json").read_bytes())["files"]["model.safetensors"]["sha256"]
    for part in ("runs/teacher", sha256, "1, for all images", "trained for 0 to 4", "a, b, c, d, e", "not stated"):
        assert part in card
    assert "| run/steps-1 | 1 | 1 | 3.21 | 2.50 |" in card and "digits-classifier" in card
    assert_refused(
        run(
            "export", "run/steps-1", "--format", "torch", "--out", "o", "--guidance", 2, "--scores", "run/results.json"
        ),
        "has no row",
    )
