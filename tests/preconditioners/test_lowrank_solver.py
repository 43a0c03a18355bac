"""solver='lowrank' in training: trajectories, resuming, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond.core.refresh import start_refresh
from mmprecond.linalg import RankSearch, columns_to_matrix, low_rank_power
from mmprecond.optimizers import FSGD, NKFAC, SGDMBK, AdaNKFAC, AFOpt, FAdam, Preconditioned
from tests.support.attention import feature_map, shift_window
from tests.support.errors import refused, warnings_of
from tests.support.lowrank import decay, moment
from tests.support.states import differences, everything, saved


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


OFTEN = dict(
    lr=1e-3,
    stat_interval=1,
    refresh_interval=2,
    damping=0.05,
    rank_share=None,
    settings='published',
)


def make(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Wide().to(dtype)
    return model, KINDS[kind](model, **OFTEN | options)


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
    other = KINDS[kind](twin, **OFTEN, solver='lowrank')
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
    stack = next(s for s in optimizer.curvature.stacks if len(s.members) == 2)
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
                    type='InputFeature',
                    solver='lowrank',
                    stat_interval=1,
                    refresh_interval=2,
                    settings='published',
                ),
            ),
            dict(
                preconditioner=dict(
                    type='NewtonKronecker',
                    solver='lowrank',
                    stat_interval=1,
                    refresh_interval=2,
                    settings='published',
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
    optimizer = AFOpt(
        model, lr=1e-2, stat_interval=1, refresh_interval=2, solver='lowrank', settings='published'
    )
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


def test_a_share_bounds_the_columns_of_both_kinds_of_sides() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(256, 4, 3), nn.Flatten(), nn.Linear(4, 256))
    widths = {}
    for share in (1 / 16, 1 / 4):
        optimizer = NKFAC(
            model,
            lr=0.0,
            solver='lowrank',
            input_factor='separable',
            rank_share=share,
            settings='published',
        )
        model(torch.randn(64, 256, 3, 3)).square().mean().backward()
        optimizer.step()
        conv, linear = (
            optimizer.curvature.layers[layer].operators for layer in optimizer.curvature.layers
        )
        widths[share] = [conv['input'].channels.shape[-1], linear['gradient'].columns.shape[-1]]
    assert widths[1 / 16][0] == 16 and widths[1 / 16][1] <= 16
    assert 16 < widths[1 / 4][0] <= 64
    with pytest.raises(ValueError, match='rank_share=1.5'):
        NKFAC(model, lr=0.1, rank_share=1.5, settings='published')
