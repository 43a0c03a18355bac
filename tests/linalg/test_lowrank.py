"""solver='lowrank': damped powers from the eigenvectors that stand out of the damping."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mmprecond.core.refresh import start_refresh
from mmprecond.linalg import (
    Dense,
    LowRank,
    RankSearch,
    apply_columns,
    columns_to_matrix,
    low_rank_power,
    unify,
)
from mmprecond.linalg.lowrank import SLACK
from mmprecond.optimizers import FSGD, NKFAC, SGDMBK, AdaNKFAC, AFOpt, FAdam, Preconditioned
from tests.support.attention import feature_map, shift_window
from tests.support.errors import refused, warnings_of
from tests.support.states import differences, everything, saved


def moment(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues (..., n)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(
        *eigenvalues.shape, eigenvalues.shape[-1], generator=generator, dtype=torch.float64
    )
    basis = torch.linalg.qr(drawn)[0]
    return (basis * eigenvalues[..., None, :]) @ basis.mT


def decay(n: int, power: float) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64) ** -power


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


# ---------------------------------------------------------------- optimizers


class Wide(nn.Module):
    """Inputs with decaying spectra; two layers of one shape, and one that is not low-rank."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(80, 60)
        self.first = nn.Linear(60, 60)
        self.second = nn.Linear(60, 60)
        self.head = nn.Linear(60, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(self.second(torch.tanh(self.first(x)))))


KINDS: dict[str, Any] = {
    'NKFAC': NKFAC,
    'AdaNKFAC': AdaNKFAC,
    'FSGD': FSGD,
    'FAdam': FAdam,
    'AFOpt': AFOpt,
    'SGDMBK': SGDMBK,
}
#: With exact powers at every refresh.
EXACT = {'NKFAC': 'cholesky', 'AdaNKFAC': 'cholesky', 'SGDMBK': 'eigh'}


@pytest.fixture(autouse=True)
def short_sides_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RankSearch, 'smallest_side', 16)


def batch(step: int, count: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    scales = decay(80, 1.0)
    return torch.randn(count, 80, generator=generator, dtype=torch.float64) * scales + 0.3 * scales


def make(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Wide().to(dtype)
    settings = dict(lr=1e-3, stat_interval=1, refresh_interval=2, damping=0.05) | options
    return model, KINDS[kind](model, **settings)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        optimizer.zero_grad()
        x = batch(step).to(dtype)
        (model(x).square() * torch.arange(1, 6)).mean().backward()
        optimizer.step()


@pytest.mark.parametrize('kind', KINDS)
def test_trajectories_follow_exact_inverses(kind: str) -> None:
    """Closer, the smaller the tolerance."""
    model, optimizer = make(kind, solver=EXACT.get(kind, 'exact'))
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    train(model, optimizer, range(8))
    wanted = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    errors = []
    for tolerance in (0.3, 0.03, 0.003):
        model, optimizer = make(kind, solver='lowrank', tolerance=tolerance)
        train(model, optimizer, range(8))
        moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
        errors.append(float((moved - wanted).norm() / wanted.norm()))
    assert errors[0] > errors[1] > errors[2] and errors[0] < 0.5 and errors[2] < 0.05
    names = {name for stack in optimizer.curvature.stacks for name in stack.operator_tensors}
    assert 'input_columns' in names


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('at', [1, 4])
@pytest.mark.parametrize('kind', KINDS)
def test_a_resumed_run_continues_bit_for_bit(kind: str, at: int, dtype: torch.dtype) -> None:
    model, optimizer = make(kind, dtype, solver='lowrank')
    train(model, optimizer, range(at))
    twin = copy.deepcopy(model)
    other = KINDS[kind](
        twin, lr=1e-3, stat_interval=1, refresh_interval=2, damping=0.05, solver='lowrank'
    )
    other.load_state_dict(saved(optimizer.state_dict()))
    train(model, optimizer, range(at, 8)), train(twin, other, range(at, 8))
    assert differences(everything(model, optimizer), everything(twin, other)) == []


def test_the_state_of_another_solver_is_measured_anew(caplog: pytest.LogCaptureFixture) -> None:
    """Columns do not fit where whole matrices are wanted; the reverse does: a side may be dense."""
    model, optimizer = make('NKFAC', solver='lowrank')
    train(model, optimizer, range(3))
    _, dense = make('NKFAC')
    dense.load_state_dict(saved(optimizer.state_dict()))
    assert 'measured anew' in warnings_of(caplog)[0]
    caplog.clear()
    model, optimizer = make('NKFAC')
    train(model, optimizer, range(3))
    _, low = make('NKFAC', solver='lowrank')
    low.load_state_dict(saved(optimizer.state_dict()))
    assert warnings_of(caplog) == []


def test_a_side_that_is_not_low_rank_stays_dense() -> None:
    """Its neighbours in the stack go with it, and what they had is carried over."""
    model, optimizer = make('NKFAC', solver='lowrank', tolerance=0.1)
    train(model, optimizer, range(3))
    stack = next(s for s in optimizer.curvature.stacks if len(s.slots) == 2)
    assert 'input_columns' in stack.operator_tensors
    before = columns_to_matrix(
        stack.operator_tensors['input_columns'], stack.operator_tensors['input_scale']
    )
    stack.statistics['input_moment'][0] = torch.eye(61)
    stack.statistics['gradient_moment'][1] *= float('nan')  # this layer keeps its last operator
    good = start_refresh(stack, [0, 1])
    assert good.tolist() == [True, False]
    assert (
        'input_columns' not in stack.operator_tensors
        and 'input_scale' not in stack.operator_tensors
    )
    torch.testing.assert_close(stack.operator_tensors['input_moment'][1], before[1])
    stack.statistics['gradient_moment'][1] = torch.eye(60)
    start_refresh(stack, [0, 1])
    assert 'input_moment' in stack.operator_tensors


def test_fewer_columns_when_fewer_do() -> None:
    model, optimizer = make('FSGD', solver='lowrank')
    train(model, optimizer, range(3))
    stack = optimizer.curvature.stacks[0]
    before = stack.operator_tensors['input_columns'].shape[-1]
    flat = torch.zeros(81, dtype=torch.float64)
    flat[0] = 1
    stack.statistics['input_moment'][0, 0] = moment(flat)
    assert start_refresh(stack, [0]).tolist() == [True]
    assert stack.operator_tensors['input_columns'].shape[-1] == 1 < before


def test_mixed_with_other_methods_and_refusals() -> None:
    model, _ = make('NKFAC')
    optimizer = Preconditioned(
        model,
        rule=dict(type='SGDM', lr=1e-3),
        layers=[
            dict(
                match=dict(name='stem'),
                preconditioner=dict(
                    type='InputFeature', solver='lowrank', stat_interval=1, refresh_interval=2
                ),
            ),
            dict(
                preconditioner=dict(
                    type='NewtonKronecker', solver='lowrank', stat_interval=1, refresh_interval=2
                )
            ),
        ],
    )
    train(model, optimizer, range(5))
    assert all(p.isfinite().all() for p in model.parameters())
    refused(ValueError, lambda: make('NKFAC', solver='lowrank', tolerance=0.0), 'tolerance')
    refused(ValueError, lambda: make('FSGD', solver='low'), 'exact, lowrank')
    refused(
        ValueError,
        lambda: make('SGDMBK', solver='lowrank', damping=1e-4),
        "set damping of at least 0.001, or solver='eigh'",
    )


def test_attention_stays_dense_beside_layers_of_low_rank() -> None:
    block = shift_window()
    model = nn.ModuleDict(dict(embed=nn.Linear(30, 6).double(), block=block))
    optimizer = AFOpt(model, lr=1e-2, stat_interval=1, refresh_interval=2, solver='lowrank')
    for step in range(5):
        optimizer.zero_grad()
        x = model['embed'](torch.randn(2, 81, 30, dtype=torch.float64) * decay(30, 3.0))
        block(x + feature_map((9, 9), seed=step), (9, 9)).square().mean().backward()
        optimizer.step()
    names = {name for stack in optimizer.curvature.stacks for name in stack.operator_tensors}
    assert {'query_left', 'value_right', 'input_columns'} <= names
    assert all(p.isfinite().all() for p in model.parameters())


def test_max_rank_keeps_the_largest() -> None:
    matrix = moment(decay(300, 1.0))
    mu = torch.tensor(0.01, dtype=torch.float64)
    assert low_rank_power(matrix, None, mu) is None  # half is not enough
    found = low_rank_power(matrix, None, mu, max_rank=20)
    assert found is not None and bool(found[2])
    basis = found[0] / torch.linalg.vector_norm(found[0], dim=-2)
    vectors = torch.linalg.eigh(matrix)[1].flip(-1)
    assert basis.shape[-1] == 20
    assert bool(((vectors[:, :10].mT @ basis).square().sum(-1) > 0.99).all())


def test_the_rank_kept_is_bounded_in_training() -> None:
    model, optimizer = make('NKFAC', solver='lowrank', max_rank=7)
    train(model, optimizer, range(4))
    widths = {
        operator.shape[-1]
        for stack in optimizer.curvature.stacks
        for name, operator in stack.operator_tensors.items()
        if 'columns' in name
    }
    assert max(widths) == 7
