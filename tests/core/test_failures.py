"""Invariant 10: what happens when a refresh fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond.core import RefreshError
from mmprecond.curvature import INPUT, Factor, Side
from mmprecond.linalg import Operators, map_tensors
from mmprecond.optimizers import NKFAC
from mmprecond.preconditioners import NewtonKronecker
from tests.support.states import curvature, same

Fails = Callable[[Tensor], bool]


class Net(nn.Module):
    """Two layers of one shape, so that they share a stack, and another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def make(**options: Any) -> tuple[Net, NKFAC]:
    model = Net()
    settings = dict(stat_interval=1, refresh_interval=1)
    return model, NKFAC(model, lr=0.01, **{**settings, **options}, settings='published')


def train(model: nn.Module, optimizer: NKFAC, steps: range) -> None:
    for step in steps:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) ** 2).mean().backward()
        optimizer.step()


class Sabotage:
    """Makes refreshes fail as a device would: bad inverses full of NaN, reported as not good.

    Attributes:
        only: Which statistics (an input moment of one layer) fail.
        dtypes: In which dtypes.
        seen: (dtype, exact) of every refresh that was asked for.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.only: Fails = lambda statistic: False
        self.dtypes = {torch.float32, torch.float64}
        self.seen: list[tuple[torch.dtype, bool]] = []
        real = NewtonKronecker.refresh

        def refresh(
            method: NewtonKronecker,
            factors: dict[Side, Factor],
            previous: Operators | None,
            damping: Any = None,
        ) -> Any:
            operators, good = real(method, factors, previous, damping)
            moments = factors[INPUT].tensor
            self.seen.append((moments.dtype, previous is None))
            bad = torch.tensor([moments.dtype in self.dtypes and self.only(m) for m in moments])
            broken = map_tensors(
                operators, lambda o: torch.where(bad[:, None, None, None], float('nan'), o)
            )
            return broken, good & ~bad

        patch.setattr(NewtonKronecker, 'refresh', refresh)


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> Sabotage:
    return Sabotage(monkeypatch)


def second_of(optimizer: NKFAC) -> Fails:
    """Picks the layer `second` by its running statistic."""
    name = 'second.weight'

    def fails(statistic: Tensor) -> bool:
        layers = optimizer.state_dict()['precond']['layers']
        own = layers[name]['statistics']['input_moment']
        return own.shape == statistic.shape and torch.equal(own.to(statistic.dtype), statistic)

    return fails


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def operators(optimizer: NKFAC) -> dict[str, Tensor]:
    return {k: v for k, v in curvature(optimizer).items() if '/operator/' in k}


def counters(optimizer: NKFAC, name: str = 'second.weight') -> tuple[int, int]:
    entry = optimizer.state_dict()['precond']['layers'][name]
    return entry['refreshes'], entry['failures']


@pytest.mark.parametrize('steps_before', [1, 5])
def test_the_last_good_operator_stays_and_others_go_on(
    steps_before: int, sabotage: Sabotage, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = make()
    train(model, optimizer, range(steps_before))
    before = operators(optimizer)
    sabotage.only = second_of(optimizer)
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        train(model, optimizer, range(5, 6))
    after = operators(optimizer)
    for key, old in before.items():
        assert after[key].isfinite().all()
        assert torch.equal(after[key], old) == key.startswith('second.weight')
    assert counters(optimizer) == (steps_before, 1)
    assert counters(optimizer, 'first.weight') == (steps_before + 1, 0)
    (message,) = warnings_of(caplog)
    assert 'second.weight' in message and 'first' not in message
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_failure_is_retried_exactly_in_float64(
    sabotage: Sabotage, caplog: pytest.LogCaptureFixture
) -> None:
    """The retry succeeds here: no failure is left, and the inverse is that of float64."""
    model, optimizer = make()
    train(model, optimizer, range(5))
    sabotage.only, sabotage.dtypes = second_of(optimizer), {torch.float32}
    sabotage.seen.clear()
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        train(model, optimizer, range(5, 6))
    assert (torch.float64, True) in sabotage.seen
    assert len([s for s in sabotage.seen if s[0] == torch.float64]) == 1
    assert counters(optimizer) == (6, 0) and not warnings_of(caplog)
    entry = optimizer.state_dict()['precond']['layers']['second.weight']
    for name, statistic in entry['statistics'].items():
        exact = statistic[0].double()
        top = torch.linalg.eigvalsh(exact)[-1]
        inverse = torch.linalg.inv(exact + 0.01 * top * torch.eye(len(exact)).double())
        assert entry['operator'][name].dtype == torch.float32
        ours = entry['operator'][name][0].double()
        assert torch.allclose(ours, inverse, rtol=0.05, atol=0.02 * float(inverse.abs().max()))


def test_the_third_failure_in_a_row_is_an_error_that_names_the_layer(sabotage: Sabotage) -> None:
    model, optimizer = make()
    train(model, optimizer, range(4))
    sabotage.only = second_of(optimizer)
    train(model, optimizer, range(4, 6))
    assert counters(optimizer) == (4, 2)
    with pytest.raises(RefreshError, match=r'^second\.weight: 3 .*`?damping') as caught:
        train(model, optimizer, range(6, 7))
    assert '\n' not in str(caught.value) and 'precondition=False' in str(caught.value)


def test_a_success_resets_the_count(sabotage: Sabotage) -> None:
    model, optimizer = make()
    train(model, optimizer, range(4))
    for start in (4, 7, 10):
        sabotage.only = second_of(optimizer)
        train(model, optimizer, range(start, start + 2))
        assert counters(optimizer)[1] == 2
        sabotage.only = lambda statistic: False
        train(model, optimizer, range(start + 2, start + 3))
        assert counters(optimizer)[1] == 0


def test_after_a_failure_the_next_refresh_is_exact(sabotage: Sabotage) -> None:
    """The last good operator is old: Newton steps from it may not reach the new inverse."""
    model, optimizer = make()
    train(model, optimizer, range(5))
    sabotage.only = second_of(optimizer)
    train(model, optimizer, range(5, 6))
    sabotage.only = lambda statistic: False
    sabotage.seen.clear()
    train(model, optimizer, range(6, 7))
    assert sorted(exact for _, exact in sabotage.seen) == [False, False, True]


def test_a_layer_without_an_operator_takes_the_plain_rule(sabotage: Sabotage) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = NKFAC(
        model, lr=1.0, momentum=0.0, stat_interval=1, refresh_interval=1, settings='published'
    )
    before = model.weight.detach().clone()
    sabotage.only = lambda statistic: True
    train(model, optimizer, range(1))
    assert torch.allclose(before - model.weight, model.weight.grad, atol=1e-6)


def test_a_failed_first_refresh_waits_for_new_statistics(sabotage: Sabotage) -> None:
    """The same statistics fail again: retrying at plain steps only uses up the three attempts."""
    model, optimizer = make(stat_interval=4, refresh_interval=4)
    sabotage.only = lambda statistic: statistic.shape[-1] == 5
    train(model, optimizer, range(4))
    assert counters(optimizer) == (0, 1)
    sabotage.only = lambda statistic: False
    train(model, optimizer, range(4, 5))
    assert counters(optimizer) == (1, 0)


@pytest.mark.parametrize('solver', ['cholesky', 'newton'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_an_indefinite_statistic_is_a_failure(
    solver: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is patched here: a saved statistic is not positive definite."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2).to(dtype)
    optimizer = NKFAC(
        model, lr=0.1, stat_interval=1, refresh_interval=1, solver=solver, settings='published'
    )
    x = torch.randn(6, 4).to(dtype)
    (model(x) ** 2).mean().backward()
    optimizer.step()
    before = operators(optimizer)
    state = optimizer.state_dict()
    entry = state['precond']['layers']['weight']
    entry['statistics']['input_moment'] = -torch.eye(5, dtype=dtype)[None]
    optimizer.load_state_dict(state)
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        optimizer.zero_grad()
        (model(x) ** 2).mean().backward()
        optimizer.step()
    assert same(operators(optimizer), before)
    assert counters(optimizer, 'weight') == (1, 1)
    assert any('weight' in message for message in warnings_of(caplog))


def test_failures_survive_a_resume(sabotage: Sabotage) -> None:
    model, optimizer = make()
    train(model, optimizer, range(3))
    sabotage.only = second_of(optimizer)
    train(model, optimizer, range(3, 5))
    twin, theirs = make()
    twin.load_state_dict(model.state_dict())
    theirs.load_state_dict(optimizer.state_dict())
    assert counters(theirs) == (3, 2)
    sabotage.only = second_of(theirs)
    with pytest.raises(RefreshError, match='second.weight'):
        train(twin, theirs, range(5, 6))


def test_a_dead_channel_is_no_failure() -> None:
    """Even without a least damping: a group's factor is zero."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 3, 3, groups=3, bias=False)
    settings: dict[str, Any] = dict(settings='published', normalise=False, damping_floor=0.0)
    optimizer = NKFAC(model, lr=0.1, **settings)
    images = torch.randn(2, 3, 5, 5)
    images[:, 1] = 0
    (model(images) ** 2).sum().backward()
    optimizer.step()
    assert counters(optimizer, 'weight') == (1, 0)
    assert model.weight.isfinite().all()


def test_a_singular_factor_is_a_failure_and_no_crash(caplog: pytest.LogCaptureFixture) -> None:
    """Too little damping for float32: a pivot is exactly zero. Float64 may still succeed."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    optimizer = NKFAC(model, lr=0.1, damping=1e-12, damping_floor=0.0, settings='published')
    (model(torch.ones(1, 64)) ** 2).sum().backward()
    optimizer.step()
    refreshes, failures = counters(optimizer, 'weight')
    assert refreshes + failures == 1
    assert bool(failures) == any('weight' in message for message in warnings_of(caplog))
    assert all(p.isfinite().all() for p in model.parameters())
