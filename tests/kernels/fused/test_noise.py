"""The noise of the kernels is the reference's stream: every word, and the normals within 2e-6."""

import pytest
import torch
from helpers import FEW, with_reference
from hypothesis import given
from hypothesis import strategies as st
from operations import assert_standard_normal
from traffic import traffic

import kernels
from kernels import reference
from kernels.fused.launch import INTERPRETED

WORDS = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1]))
IDS = st.one_of(st.integers(0, 2**63 - 1), st.sampled_from([0, 2**31, 2**32, 2**63 - 1]))


@FEW
@given(seed=WORDS, step=st.integers(0, 2**32 - 1), ids=st.lists(IDS, max_size=3), elements=st.integers(1, 2500))
def test_words_are_equal_and_normals_within_2e_6(device, seed, step, ids, elements):
    key = {"seed": seed, "step": step, "sample_ids": torch.tensor(ids, dtype=torch.int64, device=device)}
    shape = (len(ids), elements)
    assert torch.equal(*with_reference(kernels.rand, shape, device=device, **key))
    torch.testing.assert_close(*with_reference(kernels.randn, shape, device=device, **key), rtol=0, atol=2e-6)


@FEW
@given(
    batch=st.integers(1, 2),
    channels=st.sampled_from([2, 3, 4, 5, 16, 64, 65]),  # with 65, four pixels do not fit in a tile twice
    height=st.integers(1, 14),
    width=st.integers(2, 14),
    seed=WORDS,
)
def test_both_memory_orders_have_the_same_bits(device, batch, channels, height, width, seed):
    """Channels-last, a counter block is shared by four pixels of a channel, if their number divides by 4."""
    x = torch.zeros(batch, channels, height, width, device=device)
    ids = torch.arange(batch, device=device) + 2**33
    noises = [
        kernels.add_noise(x.contiguous(memory_format=layout), ids.float(), seed=seed, sample_ids=ids, step=1)[1]
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    assert torch.equal(*noises)
    expected = reference.randn(x.shape, seed=seed, sample_ids=ids, step=1)
    torch.testing.assert_close(noises[1], expected, rtol=0, atol=2e-6)


def test_shape_is_only_a_view_of_the_elements(device):
    key = {"seed": 3, "step": 1, "sample_ids": torch.arange(2, device=device), "device": device}
    flat = kernels.randn((2, 60), **key)
    assert torch.equal(kernels.randn((2, 3, 4, 5), **key), flat.view(2, 3, 4, 5))
    assert torch.equal(kernels.randn((2, 7), **key), flat[:, :7])


def test_a_million_normals_are_standard_and_independent(device, monkeypatch):
    if INTERPRETED:  # few programs: the interpreter takes its time for each
        monkeypatch.setattr("kernels.fused.common.BLOCK", 1 << 16)

    def normals(**key):
        sample_ids = torch.arange(16, device=device)
        return kernels.randn((16, 62500), sample_ids=sample_ids, device=device, **key).double().cpu().numpy()

    assert_standard_normal(normals)


@pytest.mark.interpreter
def test_bytes_are_those_of_the_result(device):
    with traffic() as seen:
        kernels.randn((2, 3, 32, 32), seed=1, sample_ids=torch.arange(2), step=0, device=device)
    assert seen.written["out"] == 2 * 3 * 32 * 32 * 4
    assert seen.read.total() < 0.01 * seen.total()
