"""Matrices of kernel positions against I (x) A, laid out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmprecond.linalg import PositionBasis, PositionMatrix, position_power


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(k: int, b: int, p: int, seed: int = 0) -> Tensor:
    rows = draw(k, b, p, 3 * p, seed=seed)
    return rows @ rows.mT / (3 * p)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 5),
    st.sampled_from([2, 3, 4, 5, 17]),
    st.sampled_from([1.0, 0.5, 2.0]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_the_damped_power_of_the_whole_matrix(
    k: int, b: int, c: int, p: int, exponent: float, joint: bool, seed: int
) -> None:
    positions = moment(k, b, p, seed)
    damping = 0.1 + draw(k, b, seed=seed).abs()
    power, succeeded = position_power(positions, damping, lambda values: values**-exponent)
    ones = 0.5 + draw(k, b, 1, int(joint), seed=seed).abs()
    operator = PositionMatrix(power, ones)
    assert bool(succeeded.all())
    matrices = draw(k, b, 3, c * p + joint, seed=seed + 1)
    right, left = operator.right(matrices), operator.left(matrices.mT)
    for layer in range(k):
        for block in range(b):
            whole = torch.kron(torch.eye(c).double(), positions[layer, block])
            values, vectors = torch.linalg.eigh(whole)
            exact = (vectors * (values + damping[layer, block]) ** -exponent) @ vectors.T
            if joint:
                exact = torch.block_diag(exact, ones[layer, block])
            wanted = matrices[layer, block] @ exact
            torch.testing.assert_close(right[layer, block], wanted, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(left[layer, block], wanted.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('joint', [0, 1])
def test_a_basis_rotates_weights_and_leaves_the_bias(joint: int) -> None:
    operator = PositionBasis(torch.linalg.qr(draw(2, 2, 3, 3))[0])
    matrices = draw(2, 2, 5, 12 + joint)
    right, left = operator.right(matrices), operator.left(matrices.mT)
    for k in range(2):
        for b in range(2):
            product = torch.kron(torch.eye(4).double(), operator.positions[k, b].contiguous())
            whole = torch.block_diag(product, torch.eye(joint).double())
            torch.testing.assert_close(right[k, b], matrices[k, b] @ whole)
            torch.testing.assert_close(left[k, b], whole @ matrices[k, b].T)


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_bad_factors_are_reported_where_they_are(bad: float) -> None:
    positions = moment(3, 1, 4)
    positions[1, 0, 0, 0] = bad
    damping = torch.tensor([[1.0], [1.0], [0.0]], dtype=torch.float64)
    _, succeeded = position_power(positions, damping, torch.reciprocal)
    assert succeeded.flatten().tolist() == [True, False, False]


def test_a_dead_layer_is_damped_alone() -> None:
    damping = torch.full((1, 1), 0.5, dtype=torch.float64)
    power, succeeded = position_power(torch.zeros(1, 1, 3, 3).double(), damping, torch.reciprocal)
    assert bool(succeeded.all())
    torch.testing.assert_close(power[0, 0], 2 * torch.eye(3).double())
