"""Each schedule against its published formula, and the contract that they share."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import schedule
from fastdiff.schedule import CosineSchedule, EvenSchedule, KarrasSchedule, LinearBetaSchedule, TableSchedule

EVEN = EvenSchedule(LinearBetaSchedule())
ALL = [CosineSchedule(), LinearBetaSchedule(), KarrasSchedule(), EVEN]
every_schedule = pytest.mark.parametrize("sched", ALL, ids=lambda s: type(s).__name__)
times = st.floats(0, 1)


def test_cosine_log_snr_at_the_ends_is_plus_and_minus_twenty():
    assert CosineSchedule().log_snr(0.0) == pytest.approx(20, abs=1e-9)
    assert CosineSchedule().log_snr(1.0) == pytest.approx(-20, abs=1e-9)
    assert CosineSchedule(log_snr_limit=5.0).log_snr(1.0) == pytest.approx(-5, abs=1e-12)


def test_cosine_is_linear_in_the_angle():
    start, end = math.atan(math.exp(-10)), math.atan(math.exp(10))
    t = torch.linspace(0, 1, 57, dtype=torch.float64)
    expected = torch.tensor([start * (1 - u) + end * u for u in t.tolist()], dtype=torch.float64)
    torch.testing.assert_close(CosineSchedule().angle(t), expected, rtol=1e-14, atol=1e-15)
    assert CosineSchedule().angle(0.5) == pytest.approx(math.pi / 4, abs=1e-15)


def test_cosine_is_the_published_log_snr_formula():
    """[PD] appendix: λ(t) = −2·log tan(a·t + b), b = arctan e^(−λmax/2), a = arctan e^(−λmin/2) − b."""
    b = np.arctan(np.exp(-0.5 * 20))
    a = np.arctan(np.exp(-0.5 * -20)) - b
    t = np.linspace(0, 1, 41)
    np.testing.assert_allclose(
        CosineSchedule().log_snr(torch.from_numpy(t)).numpy(), -2 * np.log(np.tan(a * t + b)), atol=1e-8
    )


@pytest.mark.parametrize(("first", "last", "steps"), [(1e-4, 0.02, 1000), (1e-3, 0.1, 50)])
def test_linear_beta_is_the_cumulative_product_of_one_minus_beta(first, last, steps):
    alpha_bar = np.cumprod(1 - np.linspace(first, last, steps, dtype=np.float64))
    t = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    angle = LinearBetaSchedule(first, last, steps).angle(t).numpy()
    np.testing.assert_allclose(np.cos(angle) ** 2, alpha_bar, rtol=1e-11)
    np.testing.assert_allclose(np.sin(angle) ** 2, 1 - alpha_bar, rtol=1e-9)


def test_linear_beta_is_linear_in_the_angle_between_timesteps():
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64))
    angles = np.arccos(np.sqrt(alpha_bar))
    below = np.array([0, 1, 17, 500, 998])
    for share in (0.25, 0.5, 0.9):
        t = torch.from_numpy((below + share) / 999)
        expected = (1 - share) * angles[below] + share * angles[below + 1]
        np.testing.assert_allclose(LinearBetaSchedule().angle(t).numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize(
    "of", [LinearBetaSchedule(), LinearBetaSchedule(zero_terminal=True), TableSchedule((0.9, 0.1))]
)
def test_even_is_linear_in_the_angle_between_the_ends_of_another_and_hears_its_steps(of):
    even = EvenSchedule(of)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    found = even.angle(t)
    np.testing.assert_allclose(found, np.linspace(of.angle(0.0), of.angle(1.0), 101), rtol=1e-12)
    assert even.steps == of.steps
    torch.testing.assert_close(even.step(found), of.step(found), rtol=0, atol=0)


def test_no_step_of_four_is_lost_in_noise():
    """The signal after the first of 4 steps: of those even in linear-beta's steps, it is 1 in 17 there."""
    assert [round(math.cos(one.angle(0.75)), 2) for one in (LinearBetaSchedule(), EVEN)] == [0.06, 0.38]


@pytest.mark.parametrize(("low", "high", "rho"), [(0.002, 80.0, 7.0), (0.1, 10.0, 3.0)])
def test_karras_is_equation_5_of_edm(low, high, rho):
    count = 18
    index = np.arange(count)  # EDM counts from the noisiest: i = 0 is t = 1
    sigma = (high ** (1 / rho) + index / (count - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    angle = KarrasSchedule(low, high, rho).angle(torch.from_numpy(1 - index / (count - 1)))
    np.testing.assert_allclose(np.tan(angle.numpy()), sigma, rtol=1e-11)


@every_schedule
@settings(max_examples=60, deadline=None)
@given(first=times, second=times)
def test_more_time_is_more_noise(sched, first, second):
    low, high = sorted((first, second))
    assert 0 < sched.angle(low) < math.pi / 2
    assert 0 < sched.angle(high) < math.pi / 2
    if high - low > 1e-9:
        assert sched.angle(low) < sched.angle(high)
        assert sched.log_snr(low) > sched.log_snr(high)


@every_schedule
def test_log_snr_is_the_log_of_signal_over_noise_power(sched):
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    angle = sched.angle(t)
    expected = torch.log(torch.cos(angle).square() / torch.sin(angle).square())
    torch.testing.assert_close(sched.log_snr(t), expected, rtol=1e-10, atol=1e-10)


@every_schedule
@pytest.mark.parametrize("method", ["angle", "log_snr"])
def test_floats_give_floats_and_tensors_float64_tensors(sched, method):
    compute = getattr(sched, method)
    values = [0.0, 0.125, 0.5, 1.0]
    for dtype in (torch.float32, torch.float64):
        result = compute(torch.tensor(values, dtype=dtype))
        assert result.dtype == torch.float64
        assert result.shape == (4,)
        for value, entry in zip(values, result.tolist(), strict=True):
            single = compute(value)
            assert type(single) is float
            assert single == pytest.approx(entry, rel=1e-12)
    assert compute(torch.full((2, 3), 0.3)).shape == (2, 3)


@every_schedule
def test_a_float_is_not_rounded_to_single_precision(sched):
    """Neighbouring steps of 8192 are so near that their difference would lose four digits in float32."""
    t = 4097 / 8192 + 1e-12
    assert sched.angle(t) != sched.angle(4097 / 8192)


@pytest.mark.parametrize(
    "sched",
    [
        *ALL,
        EvenSchedule(TableSchedule((0.9, 0.5, 0.1))),
        CosineSchedule(15.0),
        LinearBetaSchedule(2e-4, 0.03, 300),
        KarrasSchedule(0.01, 50.0, 5.0),
    ],
    ids=repr,
)
def test_a_schedule_survives_json(sched):
    fields = json.loads(json.dumps(sched.to_dict()))
    before = dict(fields)
    again = schedule.from_dict(fields)
    assert again == sched
    assert type(again) is type(sched)
    assert again.angle(0.37) == sched.angle(0.37)
    assert fields == before


def test_names_are_those_of_the_method():
    assert [sched.to_dict()["name"] for sched in ALL] == ["cosine", "linear-beta", "karras", "even"]
    for sched in ALL[:3]:
        assert schedule.from_dict({"name": sched.to_dict()["name"]}) == sched


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"name": "sigmoid"}, "sigmoid"),
        ({}, "None"),
        ({"log_snr_limit": 20.0}, "None"),
        ({"name": "cosine", "sigma_min": 1.0}, "sigma_min"),
        ({"name": "karras", "beta_end": 1.0}, "beta_end"),
        ({"name": "linear-beta", "rho": 7}, "rho"),
        ({"name": "even", "of": {"name": "cosine"}}, "schedule of steps"),
        ({"name": "even", "of": {"name": "sigmoid"}}, "sigmoid"),
        ({"name": "even"}, "of"),
    ],
)
def test_an_unknown_name_or_field_is_a_value_error_that_names_it(fields, named):
    with pytest.raises(ValueError, match=named):
        schedule.from_dict(fields)
