"""`fastdiff import` of diffusers' DiT, as diffusers saves it and computes with it, and what is distilled from it."""

import json
from pathlib import Path

import pytest
import torch
from command_lines import assert_refused, elsewhere, run  # noqa: F401
from common import randomize
from safetensors.torch import load_file, save_file

from fastdiff import checkpoint, rotation
from fastdiff.denoiser import Denoiser, DenoiserConfig, Guided
from fastdiff.dit import DiT
from fastdiff.unet import UNetConfig
from train.stage1 import student_of

diffusers = pytest.importorskip("diffusers")

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
}
OLD = {"cross_attention_dim": None, "num_vector_embeds": None, "use_linear_projection": False, "norm_num_groups": 32}


def network(options: dict) -> "diffusers.DiTTransformer2DModel":
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(**options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape) / max(1, parameter[0].numel()) ** 0.5)
    return net.eval()


def saved(folder, **changes) -> "diffusers.DiTTransformer2DModel":
    """The network's folder beside its scheduler's, and its own network."""
    net = network(TINY | changes)
    net.save_pretrained(Path(folder) / "transformer")
    diffusers.DDIMScheduler().save_pretrained(Path(folder) / "scheduler")
    return net


def imported(run, *more):  # noqa: F811
    line = ("import", "peer/transformer", "--scheduler", "peer/scheduler", "--out", "teacher", "--overwrite", *more)
    return run(*line)


@pytest.mark.parametrize("changes", [{}, {"patch_size": 1, "out_channels": None, "norm_eps": 1e-3}], ids=["6", "3"])
def test_outputs_are_those_of_diffusers(run, changes):  # noqa: F811
    net = saved("peer", **changes)
    result = imported(run)
    assert result.code == 0, result
    assert float(result.out.split("outputs at most ")[1].split()[0]) <= 2e-5
    assert ("half of proj_out_2.weight is dropped: it predicts the variance" in result.out) == (not changes)
    teacher = checkpoint.load("teacher")
    assert isinstance(teacher.network, DiT) and teacher.config.can_guide
    z, step, label = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 500, 999]), torch.tensor([0, 4, 2, 5])
    with torch.no_grad():
        found = teacher.network_output(z, teacher.schedule.angles()[step], label, None)
        expected = net(z, step, class_labels=label).sample[:, :3]
        velocity = Guided(teacher)(z, teacher.schedule.angles()[step], label % 5, torch.full((4,), 2.0))
        known, null = (net(z, step, class_labels=one).sample[:, :3] for one in (label % 5, torch.full((4,), 5)))
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert (found - expected.flip(0)).abs().max() > 1e-2 * expected.abs().max()  # time and label are heard
    guided = rotation.velocity_from_eps(z, 3 * known - 2 * null, teacher.schedule.angles()[step])
    assert (velocity - guided).abs().max() < 1e-4 * guided.abs().max()


def test_pipelines_and_old_folders(run):  # noqa: F811
    """The pipeline's folder; and as versions before 0.27 wrote it, with the settings of other networks in it."""
    net = saved("peer")
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=3)
    parts = {"transformer": net, "vae": vae, "scheduler": diffusers.DDIMScheduler()}
    diffusers.DiTPipeline(**parts).save_pretrained("pipeline")
    assert run("import", "pipeline", "--out", "piped").code == 0
    path = Path("peer/transformer/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | OLD | {"_class_name": "Transformer2DModel"}))
    assert imported(run).code == 0
    one, other = (checkpoint.load(name).state_dict() for name in ("teacher", "piped"))
    assert all(torch.equal(one[key], other[key]) for key in other)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_dim": 8}))
    assert_refused(imported(run), "cross_attention_dim is 8")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_fn", "geglu"),
        ("attention_bias", False),
        ("norm_type", "ada_norm"),
        ("norm_elementwise_affine", True),
        ("out_channels", 4),
        ("num_layers", 3),
        ("num_embeds_ada_norm", 7),
        ("sample_size", 9),
        ("caption_channels", 4),
        ("_class_name", "PixArtTransformer2DModel"),
    ],
)
def test_wrong_settings_are_refused_by_name(run, name, value):  # noqa: F811
    saved("peer")
    path = Path("peer/transformer/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    assert_refused(imported(run), "patches" if name == "sample_size" else name)
    assert not Path("teacher").exists()


def test_what_no_shape_shows(run, monkeypatch):  # noqa: F811
    saved("peer")
    path = Path("peer/transformer/config.json")
    with monkeypatch.context() as patch:
        patch.setattr("fastdiff.dit.EPS", 1e-3)
        assert_refused(imported(run), "off")
    weights = load_file(path.with_name("diffusion_pytorch_model.safetensors"))
    weights["pos_embed.pos_embed"] = torch.zeros(1, 16, 16)
    save_file(weights, path.with_name("diffusion_pytorch_model.safetensors"))
    assert_refused(imported(run), "pos_embed.pos_embed", "positions")
    assert_refused(imported(run, "--null-class"), "--null-class")


def test_its_students_start_where_it_is_and_learn(run):  # noqa: F811
    """w goes into the embedding, zero at first; of the two outputs the second is 0 at first."""
    saved("peer", sample_size=8, in_channels=1, out_channels=1, num_embeds_ada_norm=10)
    assert imported(run).code == 0
    teacher = checkpoint.load("teacher")
    student = student_of(teacher, (0.0, 4.0))
    assert isinstance(student.network, DiT) and student.config.parameterization == "eps-x"
    z, angle = torch.randn(4, 1, 8, 8), teacher.schedule.angles()[[10, 300, 700, 990]]
    label, w = torch.arange(4), torch.arange(4.0)
    with torch.no_grad():
        output, eps = student.network_output(z, angle, label, w), teacher.network_output(z, angle, label, None)
    assert torch.equal(output, torch.cat([eps, torch.zeros_like(eps)], dim=1))
    few = ("--updates", 2, "--batch-size", 4, "--device", "cpu")
    assert run("stage1", *few, "--teacher", "teacher", "--out", "stage1", "--gradient-checkpointing").code == 0
    rounds = (*few, "--teacher", "stage1", "--start-steps", 4, "--end-steps", 2)
    assert run("stage2", *rounds, "--out", "stage2").code == 0
    assert run("encoder", *rounds, "--out", "encoder").code == 0
    assert (
        run(
            "sid", *few, "--teacher", "stage1", "--data", "None", "--score-num", 8, "--sigma-min", 0.02, "--out", "o"
        ).code
        == 0
    )
    learned = checkpoint.load("stage2/steps-2").network
    assert learned.guidance_mlp[2].weight.abs().max() > 0 and learned.project.weight[4:].abs().max() > 0
    draw = ("--checkpoint", "stage2/steps-2", "--num", 4, "--guidance", 1, "--device", "cpu")
    assert run("sample", *draw, "--out", "g.png").code == 0


def test_dropout_and_checkpointing_of_the_network():
    """Recomputing the blocks changes no gradient, where activations are dropped, too."""
    config = UNetConfig((8, 8), 1, 3, channels=16, blocks=2, heads=2, patch_size=2, dropout=0.5, guidance_input=True)
    denoiser = randomize(Denoiser(DenoiserConfig(config, network="dit"))).train()
    z, angle, label, w = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 3]), torch.ones(2)
    gradients = []
    for denoiser.network.gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        denoiser(z, angle, label, w).square().sum().backward()
        gradients.append([p.grad.clone() for p in denoiser.parameters()])
        denoiser.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with pytest.raises(ValueError, match="patches"):
        DiT(UNetConfig((8, 8), patch_size=3))
    with pytest.raises(ValueError, match="heads"):
        DiT(UNetConfig((8, 8), channels=16, heads=3))
