"""What a network hears of the time: schedules of discrete steps, and the way back from an angle to its step."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff import schedule
from fastdiff.denoiser import TIMES, Denoiser, DenoiserConfig
from fastdiff.schedule import CosineBetaSchedule, LinearBetaSchedule, ScaledLinearSchedule, TableSchedule, VPSchedule
from fastdiff.unet import UNet, UNetConfig

TABLES = {
    "linear": LinearBetaSchedule(),
    "linear to zero": LinearBetaSchedule(zero_terminal=True),
    "scaled linear": ScaledLinearSchedule(),
    "scaled linear to zero": ScaledLinearSchedule(zero_terminal=True),
    "cosine": CosineBetaSchedule(),
    "cosine to zero": CosineBetaSchedule(zero_terminal=True),
    "given": TableSchedule((0.99, 0.9, 0.5, 0.4, 0.0)),
}
SMALL = UNetConfig((8, 8), 1, channels=8, channel_mult=(1,), blocks=1, middle_attention=False, time_scale=1.0)


@pytest.mark.parametrize("name", TABLES)
def test_every_step_comes_back_from_its_angle(name):
    table = TABLES[name]
    steps = torch.arange(table.steps, dtype=torch.float64)
    angles = table.angle(steps / (table.steps - 1))
    assert (angles - table.angles()).abs().max() < 1e-14 and (angles.diff() > 0).all()
    assert (table.step(angles) - steps).abs().max() < 1e-9
    assert (table.step(angles.float()) - steps).abs().max() < 0.01  # float32 angles are far finer than steps
    ends = torch.tensor([0.0, math.pi / 2])
    assert table.step(ends).tolist() == [0, table.steps - 1]


@pytest.mark.parametrize("name", TABLES)
@given(position=st.floats(0, 1))
def test_between_steps_the_way_back_is_the_way_there(name, position):
    table = TABLES[name]
    angle = table.angle(torch.tensor([position]))
    assert table.step(angle).item() == pytest.approx(torch.tensor(position).item() * (table.steps - 1), abs=1e-4)


@pytest.mark.parametrize("name", [name for name in TABLES if name != "given"])
def test_tables_are_their_formulas(name):
    """Products of 1 − β, in plain Python; a rescaled table has the same first step and no signal in its last."""
    table = TABLES[name]
    if isinstance(table, CosineBetaSchedule):
        f = [math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(1001)]
        betas = [min(1 - after / here, 0.999) for here, after in itertools.pairwise(f)]
    else:
        power = 2 if isinstance(table, ScaledLinearSchedule) else 1
        low, high = table.beta_start ** (1 / power), table.beta_end ** (1 / power)
        betas = [(low + (high - low) * k / 999) ** power for k in range(1000)]
    roots, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        roots.append(math.sqrt(product))
    if table.zero_terminal:
        roots = [(root - roots[-1]) * roots[0] / (roots[0] - roots[-1]) for root in roots]
    assert torch.allclose(torch.cos(table.angles()), torch.tensor(roots, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [*TABLES, "vp"])
def test_a_checkpoint_keeps_the_schedule(name):
    table = VPSchedule(beta_d=19.0) if name == "vp" else TABLES[name]
    assert schedule.from_dict(table.to_dict()) == table


@pytest.mark.parametrize(
    ("table", "said"),
    [((0.9, 0.5, 0.6), "falls"), ((0.9, 0.9), "falls"), ((1.2, 0.5), "lies in"), ((0.5, -0.1), "lies in"),
     ((0.5,), "at least 2"), ((0.9, math.nan, 0.1), "falls")],
)  # fmt: skip
def test_tables_that_rise_are_refused(table, said):
    with pytest.raises(ValueError, match=said):
        TableSchedule(table)
    with pytest.raises(ValueError, match=said):
        schedule.from_dict({"name": "table", "alphas_cumprod": list(table)})


@given(t=st.floats(0, 1))
def test_the_step_of_vp_is_its_formula(t):
    """c_noise = (M − 1)·s with σ² = exp(½·beta_d·s² + beta_min·s) − 1."""
    vp = VPSchedule()
    s = 1e-5 + (1 - 1e-5) * torch.tensor(t).double().item()
    sigma = math.sqrt(math.expm1(0.5 * 19.9 * s**2 + 0.1 * s))
    assert math.tan(vp.angle(torch.tensor(t)).item()) == pytest.approx(sigma, rel=1e-9)
    assert vp.step(torch.tensor([math.atan(sigma)])).item() == pytest.approx(999 * s, rel=1e-4, abs=1e-4)


# --- What a denoiser tells its network ---


def told(config: DenoiserConfig, angle: torch.Tensor) -> list[float]:
    heard = []

    def network(z, time, label, guidance):
        heard.extend(time.tolist())
        return z

    denoiser = Denoiser(config, torch.nn.Identity())
    denoiser.network.forward = network
    denoiser(torch.zeros(len(angle), 1, 8, 8), angle)
    return heard


def test_what_the_network_hears():
    table = TableSchedule((0.99, 0.9, 0.5, 0.4))
    config = DenoiserConfig(SMALL, table, "eps")
    angle = table.angle(torch.tensor([0.0, 1.4, 1.6, 3.0]) / 3)
    expected = {
        "angle": (angle / (math.pi / 2)).tolist(),
        "log-sigma": (torch.tan(angle).log() / 4).tolist(),
        "step": [0, 1.4, 1.6, 3],
        "nearest-step": [0, 1, 2, 3],
    }
    assert expected.keys() == {*TIMES}
    for time, values in expected.items():
        assert told(replace(config, time=time), angle) == pytest.approx(values, abs=1e-6), time
    assert told(config, angle) == pytest.approx(expected["angle"])
    assert told(replace(config, parameterization="edm"), angle) == pytest.approx(expected["log-sigma"])


def test_old_checkpoints_and_wrong_ones():
    plain = DenoiserConfig(SMALL)
    old = plain.to_dict()
    for name in ("time", "unconditional", "sources"):
        del old[name]
    for name in ("heads", "null_class"):
        del old["unet"][name]
    assert DenoiserConfig.from_dict(old) == plain
    for change, said in [({"time": "clock"}, "unknown time"), ({"time": "step"}, "schedule of steps")]:
        with pytest.raises(ValueError, match=said):
            DenoiserConfig.from_dict(plain.to_dict() | change)


class ExactNetwork(torch.nn.Module):
    """The best ε of Gaussian images of deviation 0.5, by the step that it hears: a smooth function of it."""

    def __init__(self, table: schedule.TabulatedSchedule):
        super().__init__()
        self.table = table

    def forward(self, z, time, label, guidance):
        angle = self.table.angle(time.double() / (self.table.steps - 1))
        sin, cos = torch.sin(angle), torch.cos(angle)
        return (sin / (0.25 * cos**2 + sin**2))[:, None, None, None].float() * z


@pytest.mark.parametrize("name", ["linear", "scaled linear", "cosine"])
def test_networks_of_sinusoids_hear_fractions(name):
    """Between two steps, a network that is smooth in the step is right about the image by its fraction alone.

    A look-up tells it noise that is not there: half a step off where steps are coarse, which is at little noise.
    """
    table = TABLES[name]
    middle = table.angle(torch.tensor([0.5, 1.5, 4.5, 500.5]) / (table.steps - 1))
    z = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = torch.sin(middle) / (0.25 * torch.cos(middle) ** 2 + torch.sin(middle) ** 2)
    errors = {}
    for time in ("step", "nearest-step"):
        denoiser = Denoiser(DenoiserConfig(SMALL, table, "eps", time=time), ExactNetwork(table))
        found = denoiser.network_output(z, middle, None, None)
        errors[time] = ((found / z).flatten(1)[:, 0].double() / exact - 1).abs()
    assert (errors["step"] < 1e-6).all()
    assert (errors["nearest-step"] > 100 * errors["step"]).all() and errors["nearest-step"].max() > 0.05


def test_networks_with_a_table_of_steps_hear_whole_ones():
    """An embedding of step numbers has no entry between two; told a fraction, it would take the one below."""

    class Looked(torch.nn.Module):
        def forward(self, z, time, label, guidance):
            return z + torch.arange(1000.0)[time.long()][:, None, None, None]

    table = TABLES["linear"]
    angle = table.angle(torch.tensor([3.9, 500.6]) / 999)
    heard = {}
    for time in ("step", "nearest-step"):
        denoiser = Denoiser(DenoiserConfig(SMALL, table, "eps", time=time), Looked())
        heard[time] = denoiser.network_output(torch.zeros(2, 1, 8, 8), angle, None, None).flatten(1)[:, 0].tolist()
    assert heard["nearest-step"] == [4, 501] and heard["step"] == [3, 500]


# --- The U-Net's new fields ---


def test_a_fixed_number_of_heads():
    config = UNetConfig((8, 8), 3, channels=32, channel_mult=(1, 2), attention_resolutions=(8,), heads=4, head_width=64)
    net = UNet(config)
    assert {stage.attention.heads for stage in [*net.encoder, *net.middle, *net.decoder] if stage.attention} == {4}
    with pytest.raises(ValueError, match="3 heads"):
        UNet(replace(config, heads=3))


def test_fractional_widths():
    net = UNet(UNetConfig((8, 8), 3, channels=32, channel_mult=(0.5, 1.25), blocks=1, head_width=None))
    assert net.conv_in.out_channels == 16 and net.time_mlp[0].in_features == 32
    assert net.middle[0].block.conv1.in_channels == 40
    with pytest.raises(ValueError, match="whole"):
        UNet(UNetConfig((8, 8), 3, channels=32, channel_mult=(0.3, 1), head_width=None))


def test_a_network_without_a_null_class_has_no_row_for_it():
    net = UNet(replace(SMALL, num_classes=3, null_class=False))
    assert len(net.label_embedding.weight) == 3
    with pytest.raises(ValueError, match="null class"):
        net(torch.zeros(1, 1, 8, 8), torch.zeros(1))
