"""solver='lowrank': damped powers from the eigenvectors that stand out of the damping."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmprecond.linalg import (
    Dense,
    LowRank,
    apply_columns,
    columns_to_matrix,
    low_rank_power,
    unify,
)
from mmprecond.linalg.lowrank import SLACK
from tests.support.lowrank import decay, moment


def exact_power(matrix: Tensor, damping: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * (values + damping[..., None])[..., None, :] ** -exponent) @ vectors.mT


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), 0))


@pytest.mark.parametrize('exponent', [1.0, 0.5])
@pytest.mark.parametrize('tolerance, least', [(0.1, 0.995), (0.01, 0.9999)])
@pytest.mark.parametrize('power', [2.0, 3.0, 5.0])
def test_directions_are_those_of_the_exact_power(
    power: float, tolerance: float, least: float, exponent: float
) -> None:
    matrix = moment(decay(300, power))
    damping = torch.tensor(0.01, dtype=torch.float64)
    found = low_rank_power(matrix.float(), None, damping.float(), exponent, tolerance, 250)
    assert found is not None
    basis, scale, good = found
    bound = 0.01 * (((1 + tolerance) / (1 - tolerance)) ** (1 / exponent) - 1)
    wanted_rank = int((decay(300, power) > bound).sum())
    assert bool(good) and wanted_rank // 2 <= basis.shape[-1] <= wanted_rank + 1
    gradient = torch.randn(20, 300, generator=torch.Generator().manual_seed(1))
    wanted = gradient.double() @ exact_power(matrix, damping, exponent)
    assert cosine(apply_columns(gradient, basis, scale), wanted) > least
    laid_out = columns_to_matrix(basis.double(), scale.double())
    torch.testing.assert_close(
        apply_columns(gradient.double(), basis.double(), scale.double()),
        gradient.double() @ laid_out,
    )
    # Never more than the damping allows, never negative.
    values = torch.linalg.eigvalsh(laid_out)
    assert values[0] > 0 and values[-1] < 0.01**-exponent * 1.001


@given(
    st.integers(20, 60),
    st.floats(1.2, 5.0),
    st.floats(1e-3, 0.1),
    st.floats(1e-3, 0.5),
    st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_no_direction_is_wrong_by_more_than_the_tolerance(
    n: int, power: float, damping: float, tolerance: float, seed: int
) -> None:
    """Relative error of the operator in the exact one's own scale."""
    matrix = moment(decay(n, power), seed)
    mu = torch.tensor(damping, dtype=torch.float64)
    found = low_rank_power(matrix, None, mu, 1.0, tolerance, n)
    assert found is not None
    basis, scale, good = found
    assert bool(good)
    difference = columns_to_matrix(basis, scale) @ (matrix + mu * torch.eye(n).double())
    error = torch.linalg.matrix_norm(difference - torch.eye(n).double(), 2)
    largest = SLACK * 2 * tolerance / (1 - tolerance)  # left out, relative to the damping
    assert error < max(tolerance, (1 + 1.2 * largest) * (1 - tolerance) - 1) + 1e-6


def test_layers_of_different_ranks_and_a_zero_one() -> None:
    spectra = torch.stack([decay(64, 1.0), decay(64, 6.0), torch.zeros(64).double()])[:, None]
    matrix = moment(spectra)
    mu = torch.tensor([[0.1], [0.1], [1.0]], dtype=torch.float64)
    found = low_rank_power(matrix, None, mu, max_rank=64)
    assert found is not None
    basis, scale, good = found
    assert bool(good.all())
    norms = torch.linalg.vector_norm(basis, dim=-2)
    kept = [int((n > 0).sum()) for n in norms[:, 0]]
    wanted = [int((s > 0.1 * 0.2 / 0.9).sum()) for s in spectra[:, 0]]
    assert all(w // 2 <= k <= w for k, w in zip(kept, wanted, strict=True)) and kept[2] == 0
    for k in range(3):
        exact = exact_power(matrix[k, 0], mu[k, 0], 1.0)
        assert cosine(columns_to_matrix(basis, scale)[k, 0], exact) > 0.99


@pytest.mark.parametrize('rank', [150, 151, 160, 200, 220, 300])
@pytest.mark.parametrize('warm', [False, True])
def test_what_is_not_low_rank_is_given_up(rank: int, warm: bool) -> None:
    mu = torch.tensor(0.01).double()
    matrix = moment((torch.arange(300) < rank).double())
    start = moment((torch.arange(300) < 140).double())[:, :140] if warm else None
    found = low_rank_power(matrix, start, mu)
    assert (found is None) == (rank > 150)
    if found is not None:
        exact = exact_power(matrix, mu, 1.0)
        error = torch.linalg.matrix_norm(columns_to_matrix(*found[:2]) - exact)
        assert error < 1e-3 * torch.linalg.matrix_norm(exact)


def test_a_moment_of_few_rows_that_was_summed_in_float32() -> None:
    """As the failure ladder retries it: the same matrix in float64."""
    torch.manual_seed(0)
    for rows in (1, 5, 20, 60):
        x = torch.randn(300, rows)
        matrix = (x @ x.T).double()
        mu = 0.01 * torch.linalg.eigvalsh(matrix)[-1]
        found = low_rank_power(matrix, None, mu)
        assert found is not None and bool(found[2])
        assert cosine(columns_to_matrix(*found[:2]), exact_power(matrix, mu, 1.0)) > 0.999


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_what_is_not_finite_is_a_failure(bad: float) -> None:
    matrix = torch.stack([moment(decay(64, 3.0)), moment(decay(64, 3.0))])
    matrix[1, 3, 3] = bad
    found = low_rank_power(matrix, None, torch.full((2,), 0.01).double())
    assert found is None or found[2].tolist() == [True, False]


def test_a_good_start_is_enough() -> None:
    """Each pass multiplies once; a warm one finds what a cold one needs several for."""
    matrix = moment(decay(400, 1.5))
    mu = torch.tensor(0.01, dtype=torch.float64)
    cold = low_rank_power(matrix, None, mu)
    assert cold is not None
    later = matrix + 1e-3 * moment(decay(400, 1.0), 5)
    warm = low_rank_power(later, cold[0], mu)
    assert warm is not None
    gradient = torch.randn(9, 400).double()
    assert (
        cosine(apply_columns(gradient, warm[0], warm[1]), gradient @ exact_power(later, mu, 1.0))
        > 0.998
    )


@pytest.mark.parametrize('scale', [1.0, 1000.0])
def test_the_damping_follows_features_that_moved(scale: float) -> None:
    """It is taken of the columns found, not of where the last ones pointed."""
    basis = torch.linalg.qr(torch.randn(400, 400, dtype=torch.float64))[0]
    old, new = basis[:, :1], basis[:, 1:2]
    matrix = old @ old.T + scale * new @ new.T
    seen = []

    def damping(columns: Tensor) -> Tensor:
        seen.append(torch.linalg.matrix_norm(columns, 2).square())
        return 0.01 * seen[-1]

    found = low_rank_power(matrix, old, damping)
    assert found is not None and bool(found[2])
    assert float(seen[-1]) == pytest.approx(scale, rel=1e-3)
    exact = exact_power(matrix, torch.tensor(0.01 * scale).double(), 1.0)
    assert cosine(columns_to_matrix(*found[:2]), exact) > 0.999


def test_forms_are_made_alike() -> None:
    wide, narrow, dense = torch.randn(1, 1, 8, 3), torch.randn(2, 1, 8, 2), torch.randn(1, 1, 8, 8)
    scale = torch.rand(1, 1, 1, 1)
    first = {'input': LowRank(wide, scale), 'gradient': Dense(torch.eye(4))}
    second = {'input': LowRank(narrow, scale.expand(2, 1, 1, 1)), 'gradient': Dense(torch.eye(4))}
    a, b = unify(first, second)
    assert a['input'].columns.shape[-1] == b['input'].columns.shape[-1] == 3
    for a, b in (
        unify(first, {'input': Dense(dense), 'gradient': Dense(torch.eye(4))}),
        unify({'input': Dense(dense), 'gradient': Dense(torch.eye(4))}, first)[::-1],
    ):
        assert all(type(o) is Dense for o in (*a.values(), *b.values()))
        torch.testing.assert_close(a['input'].matrix, columns_to_matrix(wide, scale))
