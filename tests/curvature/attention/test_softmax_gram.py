"""T, the Gram matrix of the softmax's Jacobians, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmprecond.curvature.attention import softmax_gram
from tests.reference import attention as oracle
from tests.reference.attention import normal
from tests.support.properties import distance, few, seeds


@few
@given(
    seeds,
    st.integers(1, 7),
    st.integers(1, 9),
    st.integers(1, 4),
    st.floats(0, 5),
    st.sampled_from(['all', 'some', 'masked']),
)
def test_gram_is_the_sum_over_explicit_jacobians(
    seed: int, queries: int, keys: int, d: int, spread: float, kind: str
) -> None:
    logits, values = spread * normal(seed, queries, keys), normal(seed + 1, keys, d)
    keep = (normal(seed + 2, queries) > 0).double() if kind == 'some' else None
    if kind == 'masked':
        logits = logits - 100.0 * (normal(seed + 3, queries, keys) > 0)
    expected = oracle.gram(logits, values, keep)
    found = softmax_gram(logits.softmax(-1), values, keep)
    assert found.shape == (keys, keys) and found.dtype == torch.float64
    assert (found - expected).norm() <= 1e-12 * queries * values.square().sum()
    # Symmetric, semi-definite, and blind to what all values have in common.
    assert torch.allclose(found, found.mT, rtol=1e-12, atol=1e-13)
    assert torch.linalg.eigvalsh(found)[0] >= -1e-12 * queries * values.square().sum()
    assert found.sum(-1).abs().max() <= 1e-12 * queries * values.square().sum()
    shifted = softmax_gram(logits.softmax(-1), values + normal(seed + 4, d), keep)
    assert torch.allclose(shifted, found, rtol=1e-9, atol=1e-11 * queries)


def test_gram_of_uniform_attention_is_the_centred_values() -> None:
    """J = (I - 11'/n) / n; and sharp attention, whose Jacobian is zero, has none."""
    values = normal(0, 6, 3)
    centred = values - values.mean(0)
    uniform = torch.full((4, 6), 1 / 6, dtype=torch.float64)
    assert distance(softmax_gram(uniform, values), 4 / 36 * centred @ centred.mT) < 1e-13
    assert softmax_gram(torch.eye(6).double(), values).norm() < 1e-13


@pytest.mark.parametrize('cached', [1, 70, 10**6])
def test_gram_of_a_batch_is_that_of_each(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('mmprecond.curvature.attention.heads.CACHED', cached)
    scores, values = normal(0, 2, 3, 4, 5).softmax(-1), normal(1, 2, 3, 5, 2)
    keep = torch.tensor([1.0, 0.0, 1.0, 1.0]).double()
    together = softmax_gram(scores, values, keep.expand(2, 3, 4))
    assert together.shape == (2, 3, 5, 5)
    for w in range(2):
        for h in range(3):
            apart = softmax_gram(scores[w, h], values[w, h], keep)
            assert distance(together[w, h], apart) < 1e-13


def test_keep_leaves_queries_out() -> None:
    """As if their rows were not there; one mask of a window serves all of its heads."""
    scores, values = normal(0, 2, 3, 6, 5).softmax(-1), normal(1, 2, 3, 5, 2)
    keep = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0, 1.0, 0.0]]).double()
    found = softmax_gram(scores, values, keep[:, None])
    for w in range(2):
        assert distance(found[w], softmax_gram(scores[w][:, keep[w] > 0], values[w])) < 1e-13
    whole = softmax_gram(scores, values)
    assert distance(found + softmax_gram(scores, values, 1 - keep[:, None]), whole) < 1e-13
    assert distance(found, whole) > 0.1


def test_masked_groups_of_tokens_do_not_meet() -> None:
    """-100 in the logits: T has a block for each group, that of the group alone."""
    logits, values = normal(0, 6, 6), normal(1, 6, 3)
    group = torch.tensor([0, 1, 0, 0, 1, 1])
    masked = logits - 100.0 * (group[:, None] != group)
    found = softmax_gram(masked.softmax(-1), values)
    assert found[group == 0][:, group == 1].abs().max() < 1e-14
    for g in range(2):
        rows = group == g
        alone = softmax_gram(logits[rows][:, rows].softmax(-1), values[rows])
        assert distance(found[rows][:, rows], alone) < 1e-12


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_equal_values_make_exact_zeros(dtype: torch.dtype) -> None:
    """Rounding errors would be indefinite, and no damping relative to them would help."""
    scores = normal(0, 3, 6, 7).softmax(-1).to(dtype)
    values = (1e-4 * normal(1, 3, 1, 5)).expand(3, 7, 5).to(dtype)
    assert not softmax_gram(scores, values).any()
