"""Inverse roots by Newton-Schulz steps and by eigenvalues: pure functions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmprecond.linalg import inverse_power, newton_schulz_inverse_root
from mmprecond.preconditioners import KroneckerRoot
from tests.reference.root import newton_schulz
from tests.support.factors import factors_of

DTYPES = [torch.float32, torch.float64]
SEEDS = st.integers(0, 10**6)


def with_values(values: list[float] | Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix of these eigenvalues."""
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    )[0]
    return basis @ (values[:, None] * basis.mT)


def exact_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.rsqrt()) @ vectors.mT


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 8), SEEDS, st.integers(-20, 20))
def test_converged_roots_are_exact(n: int, seed: int, power: int) -> None:
    """Where no eigenvalue is below a hundredth of the trace, at any scale."""
    generator = torch.Generator().manual_seed(seed)
    values = 0.1 + torch.rand(n, generator=generator, dtype=torch.float64)
    matrix = 10.0**power * with_values(values, seed)
    before = matrix.clone()
    root, good = newton_schulz_inverse_root(matrix)
    assert good.shape == () and bool(good) and torch.equal(matrix, before)
    assert torch.allclose(root, exact_root(matrix), rtol=1e-3, atol=1e-3 * float(root.abs().max()))
    many, _ = newton_schulz_inverse_root(matrix, 30)
    torch.testing.assert_close(many, exact_root(matrix), rtol=1e-9, atol=0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 8), SEEDS, st.integers(0, 12), st.floats(0, 8))
def test_roots_follow_the_published_iteration(n: int, seed: int, steps: int, spread: float) -> None:
    matrix = with_values(torch.logspace(-spread, 0, n), seed)
    root, good = newton_schulz_inverse_root(matrix, steps)
    wanted = newton_schulz(matrix, steps)
    assert bool(good)
    assert torch.allclose(root, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    'y, ratio', [(0.3, 1.0), (1e-2, 1.0), (1e-3, 0.976), (1e-4, 0.53), (1e-5, 0.18)]
)
def test_truncation_after_ten_steps(y: float, ratio: float, dtype: torch.dtype) -> None:
    """An eigenvalue of y times the trace, against its true root (spec 1.1)."""
    matrix = 7 * with_values([y, *[(1 - y) / 4] * 4])
    vectors = torch.linalg.eigh(matrix)[1]
    root, _ = newton_schulz_inverse_root(matrix.to(dtype))
    smallest = vectors[:, 0] if y < 0.2 else vectors[:, -1]
    found = float(smallest @ root.double() @ smallest)
    assert found * math.sqrt(7 * y) == pytest.approx(ratio, abs=0.006)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(2, 8), SEEDS, st.floats(0, 30), st.integers(0, 12))
def test_no_root_is_above_its_bound(n: int, seed: int, spread: float, steps: int) -> None:
    """1.5^steps / sqrt(trace): 57.7 / sqrt(trace) as published."""
    matrix = with_values(torch.logspace(-spread, 0, n, dtype=torch.float64), seed)
    root, good = newton_schulz_inverse_root(matrix, steps)
    assert bool(good)
    bound = 1.5**steps / float(matrix.trace()) ** 0.5
    assert torch.linalg.matrix_norm(root, 2) <= bound * (1 + 1e-6)


BAD = {
    'zero': torch.zeros(3, 3),
    'nan': torch.full((3, 3), float('nan')),
    'infinite': torch.diag(torch.tensor([1.0, float('inf'), 1.0])),
    'negative': -torch.eye(3),
    'no trace': torch.diag(torch.tensor([1.0, -1.0, 0.0])),
    'indefinite': torch.diag(torch.tensor([1.0, -0.5, 2.0])),
    'one nan': torch.eye(3).index_put(
        (torch.tensor(1), torch.tensor(0)), torch.tensor(float('nan'))
    ),
}


def stack_with(bad: Tensor, dtype: torch.dtype) -> Tensor:
    good = [with_values([1.0, 2.0, 3.0], seed) for seed in (1, 2)]
    return torch.stack([good[0], bad.double(), good[1]]).to(dtype)[:, None]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', BAD)
def test_bad_matrices_among_good_ones_are_reported(name: str, dtype: torch.dtype) -> None:
    stack = stack_with(BAD[name], dtype)
    for function in (newton_schulz_inverse_root, lambda m: inverse_power(m, 0.5)):
        roots, good = function(stack)
        assert good.tolist() == [[True], [False], [True]], function
        torch.testing.assert_close(
            roots[[0, 2], 0].double(),
            torch.stack([exact_root(m) for m in stack[[0, 2], 0].double()]),
            rtol=1e-3,
            atol=1e-4,
        )


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('negative', [0.01, 0.05])
def test_a_somewhat_indefinite_matrix_is_reported(negative: float, dtype: torch.dtype) -> None:
    """Its iteration grows without bound, but ten steps are too few to overflow."""
    roots, good = newton_schulz_inverse_root(with_values([1.0, -negative, 2.0]).to(dtype))
    assert not good or roots.abs().max() < 1.5**10


@pytest.mark.parametrize('solver', ['newton_schulz', 'eigh'])
@pytest.mark.parametrize('name', sorted(set(BAD) - {'zero'}))
def test_a_refresh_reports_bad_statistics(name: str, solver: str) -> None:
    method = KroneckerRoot(solver=solver)
    fine = stack_with(torch.eye(3), torch.float64)
    _, good = method.refresh(
        factors_of({'input_moment': stack_with(BAD[name], torch.float64), 'gradient_moment': fine}),
        None,
    )
    assert good.tolist() == [True, False, True]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 8),
    SEEDS,
    st.floats(0, 4),
    st.integers(-6, 6),
    st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0]),
)
def test_inverse_powers(n: int, seed: int, spread: float, power: int, exponent: float) -> None:
    """A^-p has A's eigenvectors and the powers of its eigenvalues."""
    values = 10.0**power * torch.logspace(-spread, 0, n, dtype=torch.float64)
    result, good = inverse_power(with_values(values, seed), exponent)
    wanted = with_values(values**-exponent, seed)
    assert bool(good) and result.shape == (n, n)
    assert torch.allclose(result, wanted, rtol=1e-7, atol=1e-7 * float(wanted.abs().max()))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('exponent', [0.25, 0.5, 1.0, 2.0])
def test_inverse_powers_of_a_batch_are_those_of_each(exponent: float, dtype: torch.dtype) -> None:
    stack = torch.stack([with_values([0.1, 1.0, 3.0, 4.0], k) for k in range(6)]).to(dtype)
    stack = stack.reshape(3, 2, 4, 4)
    result, good = inverse_power(stack, exponent)
    roots, fine = newton_schulz_inverse_root(stack)
    assert good.shape == fine.shape == (3, 2) and good.all() and fine.all()
    assert result.dtype == roots.dtype == dtype
    for k in range(3):
        for b in range(2):
            torch.testing.assert_close(
                result[k, b], inverse_power(stack[k, b], exponent)[0], rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                roots[k, b], newton_schulz_inverse_root(stack[k, b])[0], rtol=1e-4, atol=1e-5
            )
