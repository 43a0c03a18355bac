"""Copies of a model with its optimizer, by deepcopy, pickle and torch.save, go on exactly."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.every_optimizer import MEASURED, SETTINGS, make, mostly_slow, net, train
from tests.support.states import differences

Pair = tuple[nn.Module, Any]


def by_torch(pair: Pair) -> Pair:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair)), by_torch]


def state_of(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return copy.deepcopy(dict(model=dict(model.state_dict()), state=optimizer.state_dict()))


@pytest.mark.parametrize('way', COPIES, ids=['deepcopy', 'pickle', 'torch.save'])
@pytest.mark.parametrize('at', [0, 3])
@pytest.mark.parametrize('name', mostly_slow(SETTINGS))
def test_a_copy_goes_on_as_the_original(name: str, at: int, way: Callable[[Pair], Pair]) -> None:
    model = net()
    optimizer = make(name, model)
    train(name, model, optimizer, range(at))
    optimizer.zero_grad()
    twin, other = way((model, optimizer))
    assert type(other) is type(optimizer) and other.t == at
    assert {id(p) for g in other.param_groups for p in g['params']} == set(
        map(id, twin.parameters())
    )
    before = state_of(model, optimizer)
    train(name, twin, other, range(at, 7))
    assert differences(before, state_of(model, optimizer)) == []  # the original is left alone
    train(name, model, optimizer, range(at, 7))
    assert differences(state_of(model, optimizer), state_of(twin, other)) == []


@pytest.mark.parametrize('name', MEASURED)
def test_a_copy_is_measured_by_itself(name: str) -> None:
    """Hooks of one are none of the other's, armed or not."""
    model = net()
    optimizer = make(name, model)
    train(name, model, optimizer, range(2))
    optimizer.arm()
    optimizer.zero_grad()
    twin, other = copy.deepcopy((model, optimizer))
    train(name, twin, other, range(2, 4))
    assert other.curvature.capture is not optimizer.curvature.capture
    assert not optimizer.curvature.capture.staged


def test_a_scheduler_does_not_travel_along() -> None:
    model = net()
    optimizer = make('NKFAC', model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    twin, other = copy.deepcopy((model, optimizer))
    train('NKFAC', twin, other, range(2))
    assert other.t == 2 and optimizer.t == 0 and schedule.get_last_lr() == [1e-2]
