"""The noise of the kernels is the reference's stream: every word, and the normals within 2e-6."""

import math

import numpy as np
import pytest
import torch
from helpers import FEW, on_reference
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from traffic import traffic

import kernels
from kernels.fused.launch import INTERPRETED

WORDS = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1]))
IDS = st.one_of(st.integers(0, 2**63 - 1), st.sampled_from([0, 2**31, 2**32, 2**63 - 1]))


@FEW
@given(seed=WORDS, step=st.integers(0, 2**32 - 1), ids=st.lists(IDS, max_size=3), elements=st.integers(1, 2500))
def test_words_are_equal_and_normals_within_2e_6(device, seed, step, ids, elements):
    key = {"seed": seed, "step": step, "sample_ids": torch.tensor(ids, dtype=torch.int64, device=device)}
    shape = (len(ids), elements)
    uniform, normal = (make(shape, device=device, **key) for make in (kernels.rand, kernels.randn))
    assert torch.equal(uniform, on_reference(kernels.rand, shape, device=device, **key))
    exact = on_reference(kernels.randn, shape, device=device, **key)
    torch.testing.assert_close(normal, exact, rtol=0, atol=2e-6)


def test_shape_is_only_a_view_of_the_elements(device):
    key = {"seed": 3, "step": 1, "sample_ids": torch.arange(2, device=device), "device": device}
    flat = kernels.randn((2, 60), **key)
    assert torch.equal(kernels.randn((2, 3, 4, 5), **key), flat.view(2, 3, 4, 5))
    assert torch.equal(kernels.randn((2, 7), **key), flat[:, :7])


@pytest.fixture(scope="module")
def draw_million(device):
    """(16, 62500) normals of a seed and a step, in few programs: the interpreter takes its time for each."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setattr("kernels.fused.common.BLOCK", 1 << 16)

        def normals(**key):
            with kernels.use("triton"):
                ids = torch.arange(16, device=device)
                return kernels.randn((16, 62500), sample_ids=ids, device=device, **key).double().cpu().numpy()

        yield normals


@pytest.fixture(scope="module")
def million(draw_million):
    return draw_million(seed=11, step=4)


def test_a_million_normals_pass_kolmogorov_smirnov(million):
    assert million.size == 1_000_000
    assert stats.kstest(million.ravel(), "norm").pvalue > 1e-3
    assert 4.4 < np.abs(million).max() < 6.5


def test_a_million_normals_are_uncorrelated(million, draw_million):
    limit = 4.5 / math.sqrt(million.size)
    for lag in (1, 2, 3, 4, 8):
        assert abs((million[:, lag:] * million[:, :-lag]).mean()) < 1.01 * limit
    assert abs((million[1:] * million[:-1]).mean()) < 1.05 * limit
    for change in ({"seed": 12, "step": 4}, {"seed": 11, "step": 5}):
        assert abs((million * draw_million(**change)).mean()) < limit


@pytest.mark.interpreter
def test_bytes_are_those_of_the_result(device):
    with traffic() as seen:
        kernels.randn((2, 3, 32, 32), seed=1, sample_ids=torch.arange(2), step=0, device=device)
    assert seen.written["out"] == 2 * 3 * 32 * 32 * 4
    assert seen.read.total() < 0.01 * seen.total()
