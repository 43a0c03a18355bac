"""Invariant 8: the state is plain values by parameter name, and a resumed run continues exactly."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond.optimizers import NKFAC, AdaNKFAC, PreconditionedOptimizer
from tests.support.errors import refused, warnings_of
from tests.support.late_layers import Net, train
from tests.support.states import differences, everything, saved, walk

KINDS: dict[str, tuple[type[PreconditionedOptimizer], dict[str, Any]]] = {
    'NKFAC': (NKFAC, dict(lr=0.05, momentum=0.9, weight_decay=0.01)),
    'no momentum': (NKFAC, dict(lr=0.05, momentum=0.0)),
    'cholesky': (NKFAC, dict(lr=0.05, solver='cholesky')),
    'AdaNKFAC': (AdaNKFAC, dict(lr=0.01, weight_decay=0.1)),
    'one-sided': (NKFAC, dict(lr=0.05, max_dim=8)),
}


def make(
    kind: str = 'NKFAC', model: nn.Module | None = None, **options: Any
) -> tuple[nn.Module, PreconditionedOptimizer]:
    model = Net() if model is None else model
    cls, settings = KINDS[kind]
    given = {**settings, 'stat_interval': 1, 'refresh_interval': 2, **options}
    return model, cls(model, **given, settings='published')


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('steps', [0, 1, 5])
def test_the_state_holds_plain_values_by_parameter_name(kind: str, steps: int) -> None:
    model, optimizer = make(kind)
    train(model, optimizer, range(steps))
    state = optimizer.state_dict()
    assert walk(state) == []
    names = dict(model.named_parameters())
    layers = state['precond']['layers']
    assert all(name in names for name in layers)
    assert len(layers) == {0: 0, 1: 3, 5: 4}[steps] or kind == 'one-sided'
    assert differences(saved(state), state) == []


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('at', [1, 2, 4, 7, 8])
def test_a_resumed_run_continues_bit_for_bit(kind: str, at: int) -> None:
    model, optimizer = make(kind)
    train(model, optimizer, range(at))
    kept = saved(optimizer.state_dict())
    twin, resumed = make(kind, copy.deepcopy(model))
    resumed.load_state_dict(kept)
    assert differences(resumed.state_dict(), kept) == []
    train(model, optimizer, range(at, 14))
    train(twin, resumed, range(at, 14))
    assert differences(everything(model, optimizer), everything(twin, resumed)) == []
    assert optimizer.t == resumed.t == 14


def test_loading_leaves_the_saved_curvature_alone() -> None:
    model, optimizer = make()
    train(model, optimizer, range(4))
    kept = saved(optimizer.state_dict())
    before = copy.deepcopy(kept)
    twin, resumed = make(model=copy.deepcopy(model))
    resumed.load_state_dict(kept)
    train(twin, resumed, range(4, 8))
    assert differences(kept['precond'], before['precond']) == []


def test_loading_drops_what_was_staged_and_arms_for_the_loaded_step() -> None:
    model, optimizer = make(stat_interval=2, refresh_interval=2)
    train(model, optimizer, range(3))
    kept = saved(optimizer.state_dict())
    twin, resumed = make(model=copy.deepcopy(model), stat_interval=2, refresh_interval=2)
    twin.eval()
    (twin(torch.randn(6, 2, 5, 5), late=True) ** 2).mean().backward()
    twin.train()
    assert resumed.curvature.capture.staged
    resumed.load_state_dict(kept)
    assert not resumed.curvature.capture.staged
    assert not any(m._forward_hooks for m in twin.modules())
    train(model, optimizer, range(3, 8))
    train(twin, resumed, range(3, 8))
    assert differences(everything(model, optimizer), everything(twin, resumed)) == []


def test_loading_drops_the_samples_of_a_step_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make(stat_interval=1, refresh_interval=10)
    train(model, optimizer, range(6))
    kept = saved(optimizer.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(optimizer.rule, 'compute_updates', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(model, optimizer, range(6, 7))
    optimizer.load_state_dict(kept)
    assert differences(saved(optimizer.state_dict())['precond'], kept['precond']) == []


@pytest.mark.parametrize('why', ['missing', 'not saved'])
def test_without_saved_curvature_it_is_measured_at_the_next_step(
    why: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = dict(stat_interval=5, refresh_interval=10)
    model, optimizer = make(save_curvature=why == 'missing', **options)
    train(model, optimizer, range(7))
    state = optimizer.state_dict()
    if why == 'missing':
        del state['precond']
    else:
        assert state['precond']['layers'] == {}
    twin, resumed = make(model=copy.deepcopy(model), **options)
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        resumed.load_state_dict(saved(state))
    assert len([m for m in warnings_of(caplog) if 'curvature' in m]) == 1
    buffers = [s['momentum_buffer'] for s in optimizer.state.values()]
    theirs = [s['momentum_buffer'] for s in resumed.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(buffers, theirs, strict=True))
    train(twin, resumed, range(7, 8))
    entries = resumed.state_dict()['precond']['layers']
    assert len(entries) == 4 and all(e['refreshes'] == 1 for e in entries.values())


def test_a_state_of_step_zero_loads_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    _, optimizer = make()
    state = saved(optimizer.state_dict())
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        make()[1].load_state_dict(state)
    assert warnings_of(caplog) == []


class Renamed(Net):
    """The same parameters under other names."""

    def __init__(self) -> None:
        super().__init__()
        for name in ('conv', 'late', 'early', 'last'):
            setattr(self, f'_{name}', self._modules.pop(name))

    def forward(self, x: Tensor, late: bool) -> Tensor:
        x = torch.tanh(self.norm(self._early(self._conv(x).mean((2, 3)))))
        return self._last(self._late(x) if late else x)


def test_the_curvature_of_another_model_is_measured_anew(caplog: pytest.LogCaptureFixture) -> None:
    """Same number of parameters, so that torch accepts the rest."""
    model, optimizer = make()
    train(model, optimizer, range(5))
    other, resumed = make(model=Renamed())
    state = saved(optimizer.state_dict())
    state['state'] = {}
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        resumed.load_state_dict(state)
    (message,) = warnings_of(caplog)
    assert 'measured anew' in message and '\n' not in message
    train(other, resumed, range(5, 7))
    layers = resumed.state_dict()['precond']['layers']
    assert sorted(layers) == sorted(f'_{name}.weight' for name in ('conv', 'late', 'early', 'last'))


def test_a_state_of_another_number_of_parameters_is_torchs_error() -> None:
    _, optimizer = make()
    with pytest.raises(ValueError, match='parameter group'):
        optimizer.load_state_dict(make(model=nn.Linear(2, 2))[1].state_dict())


def set_nan(kind: str) -> Callable[[dict[str, Any]], None]:
    def corrupt(entry: dict[str, Any]) -> None:
        entry[kind]['input_moment'][0, 0, 0] = float('nan')

    return corrupt


CORRUPTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    'NaN statistic': set_nan('statistics'),
    'NaN operator': set_nan('operator'),
    'infinite': lambda e: e['statistics']['gradient_moment'].fill_(float('inf')),
    'no statistics': lambda e: e.pop('statistics'),
    'no operator': lambda e: e.pop('operator'),
    'no counters': lambda e: e.pop('refreshes'),
    'counter is None': lambda e: e.update(failures=None),
    'one statistic': lambda e: e['statistics'].popitem(),
    'unknown statistic': lambda e: e['statistics'].update(other=torch.zeros(1, 5, 5)),
    'unknown operator': lambda e: e['operator'].update(other=torch.zeros(1, 5, 5)),
    'shape': lambda e: e['statistics'].update(input_moment=torch.zeros(1, 4, 4)),
    'shape of the operator': lambda e: e['operator'].update(gradient_moment=torch.zeros(4, 4)),
    'no tensor': lambda e: e['statistics'].update(input_moment=[1.0]),
    'statistics is a list': lambda e: e.update(statistics=[]),
    'one operator': lambda e: e['operator'].popitem(),
    'empty operator': lambda e: e['operator'].clear(),
    'no method': lambda e: e.pop('method'),
    'another method': lambda e: e.update(method='Rotation'),
}


@pytest.mark.parametrize('name', CORRUPTIONS)
def test_a_corrupt_entry_is_named_and_measured_anew(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = make()
    train(model, optimizer, range(6))
    state = saved(optimizer.state_dict())
    CORRUPTIONS[name](state['precond']['layers']['early.weight'])
    twin, resumed = make(model=copy.deepcopy(model))
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        resumed.load_state_dict(state)
    (message,) = warnings_of(caplog)
    assert 'early.weight' in message and 'late.weight' not in message and '\n' not in message
    assert 'early.weight' not in resumed.state_dict()['precond']['layers']
    assert resumed.t == 6
    train(twin, resumed, range(6, 8))
    layers = resumed.state_dict()['precond']['layers']
    assert layers['early.weight']['refreshes'] == 1 and layers['late.weight']['refreshes'] > 1
    assert all(p.isfinite().all() for p in twin.parameters())


WHOLES: dict[str, Callable[[dict[str, Any]], Any]] = {
    'entry is None': lambda s: s['precond']['layers'].update({'early.weight': None}),
    'layers is None': lambda s: s['precond'].update(layers=None),
    'no layers': lambda s: s['precond'].pop('layers'),
    'no steps': lambda s: s['precond'].pop('steps'),
    'None': lambda s: s.update(precond=None),
}


@pytest.mark.parametrize('name', WHOLES)
def test_a_corrupt_state_is_reported_and_measured_anew(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = make()
    train(model, optimizer, range(6))
    state = saved(optimizer.state_dict())
    WHOLES[name](state)
    twin, resumed = make(model=copy.deepcopy(model))
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        resumed.load_state_dict(state)
    assert len(warnings_of(caplog)) == 1 and '\n' not in warnings_of(caplog)[0]
    train(twin, resumed, range(6, 9))
    assert len(resumed.state_dict()['precond']['layers']) == 4
    assert all(p.isfinite().all() for p in twin.parameters())


def test_a_partial_state_is_refused_before_anything_changes() -> None:
    net = Net()
    optimizer = NKFAC(net, lr=0.1, stat_interval=1, refresh_interval=1, settings='published')
    train(net, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, range(2, 3))
    state['precond']['whole'] = False
    before = copy.deepcopy(optimizer.state_dict())
    refused(ValueError, lambda: optimizer.load_state_dict(state), "sharding='apply'")
    assert differences(optimizer.state_dict(), before) == []
