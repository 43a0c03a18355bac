"""The forecast of memory against what is there after training."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from mmprecond.core import memory
from tests.support.every_optimizer import MEASURED, make, net, train


@pytest.mark.parametrize(
    'options',
    [{}, dict(max_dim=10, oversize='lowrank', max_rank=4), dict(max_dim=10, oversize='block')],
    ids=str,
)
@pytest.mark.parametrize('name', MEASURED)
def test_it_is_what_will_be_kept(name: str, options: dict[str, Any]) -> None:
    if options and name in ('AdamR', 'AdamWBK', 'SGDMBK', 'Preconditioned', 'SKFAC', 'SOAP'):
        pytest.skip('takes no such option, or refuses it')
    model = net()
    optimizer = make(name, model, **options)
    ((device, (kept, more)),) = optimizer.curvature.forecast().items()
    assert device == torch.device('cpu') and more > 0
    train(name, model, optimizer, range(5))
    tensors = [
        t
        for stack in optimizer.curvature.stacks
        for kind in (stack.statistics, stack.operator_tensors)
        for t in kind.values()
    ]
    assert sum(t.numel() * t.element_size() for t in tensors) / 2**20 == pytest.approx(kept)


def test_frozen_layers_are_left_out() -> None:
    model = net()
    whole = sum(kept for kept, _ in make('NKFAC', model).curvature.forecast().values())
    model.fc1.weight.requires_grad_(False)
    optimizer = make('NKFAC', model)
    part = sum(kept for kept, _ in optimizer.curvature.forecast().values())
    assert whole - part == pytest.approx(2 * (7**2 + 12**2) * 8 / 2**20)
    assert 'fc1' in optimizer.table() and 'frozen' in optimizer.table()


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_free_memory_of_this_machine() -> None:
    assert 50 < memory.available(torch.device('cpu')) < 2**26
    assert memory.available(torch.device('meta')) == float('inf')
