"""Eigenbases, how one follows another, and the rotation by them: pure functions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmprecond.linalg import Dense, assign_columns, eigenbasis, named_tensors, orthogonal_iteration
from mmprecond.preconditioners import EigenRotation
from tests.reference.rotation import assigned, iterated
from tests.support.factors import factors_of

DTYPES = [torch.float32, torch.float64]
SEEDS = st.integers(0, 10**6)
NAMES = ('gradient_moment', 'input_moment')


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(*shape: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(*shape, shape[-1], seed=seed))[0]


def moment(n: int, low: float = 0.1, seed: int = 0) -> Tensor:
    """Symmetric positive definite (n, n) with well separated eigenvalues from low to 1."""
    values = torch.logspace(math.log10(low), 0, n, dtype=torch.float64)
    basis = orthogonal(n, seed=seed)
    return basis @ (values[:, None] * basis.mT)


def is_orthogonal(basis: Tensor, atol: float) -> bool:
    return torch.allclose(basis.mT @ basis, torch.eye(basis.shape[-1]).to(basis), atol=atol)


def kept(old: Tensor, new: Tensor) -> float:
    """Least u_old'u over all columns: 1 where each keeps its place and sign."""
    return float((old * new).sum(-2).min())


def rotation(previous: Any, solver: str, **moments: Tensor) -> dict[str, Tensor]:
    """One refresh as an optimizer does it."""
    method = EigenRotation(basis_solver=solver)
    last = {slot_of(name): Dense(basis) for name, basis in (previous or {}).items()}
    operators, good = method.refresh(factors_of(moments), None if solver == 'eigh' else last)
    assert good.all()
    return named_tensors(method.align(operators, last))


def slot_of(name: str) -> str:
    return name.removesuffix('_moment')


# ------------------------------------------------------------------- apply and restore


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 6),
    st.integers(1, 6),
    SEEDS,
    st.sets(st.sampled_from(NAMES)),
)
def test_a_rotation_keeps_the_norm_and_turns_back(
    k: int, b: int, o: int, i: int, seed: int, names: set[str]
) -> None:
    """Also with a basis on one side or on none."""
    gradients = normal(k, b, o, i, seed=seed)
    both = {
        'gradient_moment': orthogonal(k, b, o, seed=seed + 1),
        'input_moment': orthogonal(k, b, i, seed=seed + 2),
    }
    operator = {slot_of(name): Dense(both[name]) for name in names}
    method = EigenRotation()
    turned = method.apply(operator, gradients)
    torch.testing.assert_close(turned.norm(dim=(2, 3)), gradients.norm(dim=(2, 3)))
    torch.testing.assert_close(method.restore(operator, turned), gradients, rtol=0, atol=1e-12)
    left, right = (
        both[n] if n in names else torch.eye(s).double() for n, s in zip(NAMES, (o, i), strict=True)
    )
    torch.testing.assert_close(turned, left.mT @ gradients @ right, rtol=0, atol=1e-12)


# ------------------------------------------------------------------- eigenbases


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 9), SEEDS, st.integers(-30, 30), st.sampled_from([0.0, 1e-6, 0.01, 1.0]))
def test_an_eigenbasis_diagonalises(n: int, seed: int, power: int, shift: float) -> None:
    """At any scale; the shift changes no eigenvector."""
    matrix = 10.0**power * moment(n, seed=seed)
    before = matrix.clone()
    basis, good = eigenbasis(matrix, shift)
    assert good.shape == () and bool(good) and torch.equal(matrix, before)
    assert is_orthogonal(basis, 1e-12)
    turned = basis.mT @ (matrix / 10.0**power) @ basis
    values = turned.diagonal()
    assert torch.allclose(turned, values.diag(), atol=1e-10) and (values.diff() <= 1e-12).all()


DEGENERATE = {
    'zero': torch.zeros(5, 5),
    'identity': torch.eye(5),
    'one row': torch.ones(5, 5),
    'tiny': torch.eye(5) * 1e-38,
    'huge': torch.eye(5) * 1e37,
    'two pairs': torch.diag(torch.tensor([2.0, 1.0, 2.0, 1.0, 0.0])),
    'dead input': torch.diag(torch.tensor([0.0, 0.0, 3.0, 0.0, 1.0])),
    'one dead row': torch.ones(5, 5)
    .index_fill(0, torch.tensor([2]), 0.0)
    .index_fill(1, torch.tensor([2]), 0.0),
}


@pytest.mark.parametrize('solver', ['eigh', 'qr'])
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', DEGENERATE)
def test_degenerate_spectra_give_orthogonal_bases(
    name: str, dtype: torch.dtype, solver: str
) -> None:
    matrix = DEGENERATE[name].to(dtype)[None, None]
    operator = rotation(None, 'eigh', input_moment=matrix)
    for _ in range(3):
        basis = operator['input_moment']
        assert is_orthogonal(basis, 1e-5) and basis.dtype == dtype
        scale = matrix.abs().max().clamp_min(torch.finfo(dtype).tiny)
        turned = basis.mT @ (matrix / scale) @ basis
        off = turned - turned.diagonal(dim1=-2, dim2=-1).diag_embed()
        assert off.abs().max() < 1e-5
        operator = rotation(operator, solver, input_moment=matrix)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('solver', ['eigh', 'qr'])
def test_a_bad_statistic_among_good_ones_is_reported(
    solver: str, value: float, dtype: torch.dtype
) -> None:
    stack = torch.stack([moment(4, seed=k) for k in range(3)]).to(dtype)[:, None].repeat(1, 2, 1, 1)
    previous = rotation(None, 'eigh', input_moment=stack)
    stack[1, 0, 2, 1] = value
    method = EigenRotation(basis_solver=solver)
    last = {'input': Dense(previous['input_moment'])}
    operators, good = method.refresh(
        factors_of({'input_moment': stack}), None if solver == 'eigh' else last
    )
    assert good.tolist() == [True, False, True]
    aligned = method.align(operators, last)['input'].matrix
    assert is_orthogonal(aligned[[0, 2]], 1e-5)


# ------------------------------------------------------------------- orthogonal iteration


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 7), SEEDS, SEEDS)
def test_an_iteration_is_gram_schmidt_from_the_largest_down(n: int, seed: int, other: int) -> None:
    matrix, basis = moment(n, seed=seed), orthogonal(n, seed=other)
    result, good = orthogonal_iteration(matrix, basis)
    assert bool(good) and is_orthogonal(result, 1e-12)
    torch.testing.assert_close(result, iterated(matrix, basis), rtol=0, atol=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 7), SEEDS)
def test_eigenvectors_in_any_order_stay(n: int, seed: int) -> None:
    matrix = moment(n, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1
    basis = eigenbasis(matrix)[0][:, torch.randperm(n, generator=generator)] * signs
    torch.testing.assert_close(orthogonal_iteration(matrix, basis)[0], basis, rtol=0, atol=1e-9)


@pytest.mark.parametrize('seed', range(4))
def test_iterations_converge_to_the_eigenvectors(seed: int) -> None:
    matrix, basis = moment(6, seed=seed), orthogonal(6, seed=seed + 50)
    for _ in range(150):
        basis, _ = orthogonal_iteration(matrix, basis)
    turned = basis.mT @ matrix @ basis
    assert torch.allclose(turned, turned.diagonal().diag(), atol=1e-10)


def test_iterations_keep_the_basis_of_a_null_space() -> None:
    """A statistic that does not change changes no column."""
    rows = normal(3, 8)
    matrix = rows.mT @ rows
    basis, _ = eigenbasis(matrix, 0.01)
    again, good = orthogonal_iteration(matrix, basis)
    assert bool(good) and kept(basis, assign_columns(again, basis)) > 0.999


# ------------------------------------------------------------------- order and signs


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 9), SEEDS, SEEDS, st.integers(1, 3))
def test_columns_are_assigned_closest_pairs_first(
    n: int, seed: int, other: int, count: int
) -> None:
    """The same as one pair after another, whatever order and signs the new columns come in."""
    basis, old = orthogonal(count, n, seed=seed), orthogonal(count, n, seed=other)
    result = assign_columns(basis, old)
    for new, one, before in zip(result, basis, old, strict=True):
        torch.testing.assert_close(new, assigned(one, before), rtol=0, atol=1e-12)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1
    shuffled = basis[:, :, torch.randperm(n, generator=generator)] * signs
    torch.testing.assert_close(assign_columns(shuffled, old), result, rtol=0, atol=1e-12)
    assert (result * old).sum(-2).min() >= -1e-12
    torch.testing.assert_close(assign_columns(shuffled, basis), basis, rtol=0, atol=1e-12)


def hadamard(n: int) -> Tensor:
    matrix = torch.ones(1, 1).double()
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / n**0.5


@pytest.mark.parametrize('dtype', DTYPES)
def test_ties_and_what_is_not_finite_come_to_an_end(dtype: torch.dtype) -> None:
    """All overlaps are equal; or there are none."""
    eye = torch.eye(16, dtype=dtype)
    mixed = assign_columns(hadamard(16).to(dtype), eye)
    assert is_orthogonal(mixed, 1e-6)
    pairs = (hadamard(16) @ mixed.double()).abs().argmax(0)
    assert sorted(pairs.tolist()) == list(range(16))
    assert torch.equal(assign_columns(eye, eye), eye)
    assign_columns(torch.full((16, 16), float('nan'), dtype=dtype), eye)
    assign_columns(torch.zeros(3, 16, 16, dtype=dtype), eye.expand(3, 16, 16))
    assert assign_columns(torch.ones(1, 1, dtype=dtype), -torch.ones(1, 1, dtype=dtype)) == -1


@pytest.mark.parametrize('solver', ['eigh', 'qr'])
@pytest.mark.parametrize('seed', range(4))
def test_slow_change_keeps_places_and_signs(solver: str, seed: int) -> None:
    """Also where the eigenvalues' order changes on the way, between two refreshes."""
    basis, turn = orthogonal(6, seed=seed), normal(6, 6, seed=seed + 9)
    values, ends = (
        torch.tensor(v).double()
        for v in ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [6.05, 4.5, 3.2, 2.3, 1.4, 0.7])
    )
    operator: dict[str, Tensor] | None = None
    first: Tensor | None = None
    for step in range(11):
        # Crossings fall between refreshes; the basis turns by some degrees on the whole.
        now = basis @ torch.linalg.matrix_exp(0.004 * step * (turn - turn.mT))
        spectrum = values + (ends - values) * step / 10
        left = (now * spectrum) @ now.mT
        new = rotation(
            operator,
            solver,
            gradient_moment=left[None, None],
            input_moment=left.flip(0, 1)[None, None],
        )
        if operator is not None:
            for name in NAMES:
                assert kept(operator[name], new[name]) > (0.95 if solver == 'eigh' else 0.9)
        operator = new
        first = new['gradient_moment'] if first is None else first
    assert kept(first, operator['gradient_moment']) > 0.8


def test_the_first_basis_follows_the_identity() -> None:
    """A nearly diagonal moment turns nothing around."""
    noise = 1e-3 * normal(5, 5)
    matrix = torch.diag(torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0]).double()) + noise + noise.mT
    new = rotation(None, 'eigh', input_moment=matrix[None, None])['input_moment'][0, 0]
    assert torch.allclose(new, torch.eye(5).double(), atol=0.01)


def test_a_layer_without_a_basis_follows_the_identity_beside_one_that_has() -> None:
    """Its place in a stack's operators holds zeros."""
    matrix = torch.stack([moment(5, seed=k) for k in range(2)])[:, None]
    alone = rotation(None, 'eigh', input_moment=matrix)['input_moment']
    old = torch.stack([orthogonal(5, seed=7), torch.zeros(5, 5).double()])[:, None]
    new = rotation({'input_moment': old}, 'eigh', input_moment=matrix)['input_moment']
    assert torch.equal(new[1], alone[1])
    assert (new[0] * old[0]).sum(-2).min() >= 0


@pytest.mark.parametrize('n', [64, 200])
def test_large_bases_take_few_rounds(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round waits for the device."""
    rounds, argmax = [], Tensor.argmax
    monkeypatch.setattr(Tensor, 'argmax', lambda t, *a: rounds.append(1) or argmax(t, *a))
    assign_columns(orthogonal(n).float(), orthogonal(n, seed=1).float())
    assert len(rounds) / 2 < 8 * math.log2(n)
