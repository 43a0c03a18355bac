"""Rates for another batch size: linear for rules like SGD, the root for rules like Adam."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import nn

from mmprecond.engine.rates import scale_rates
from mmprecond.optimizers import NKFAC, AdaNKFAC


def scaled(*optimizers: torch.optim.Optimizer, enable: bool = True, counts: int = 1) -> list[float]:
    """Rates after ours and MMEngine's scaling from 16 images to 2 x 32."""
    wrappers = [OptimWrapper(optimizer, accumulative_counts=counts) for optimizer in optimizers]
    named = {str(number): wrapper for number, wrapper in enumerate(wrappers)}
    wrapper: Any = OptimWrapperDict(**named) if len(wrappers) > 1 else wrappers[0]
    runner = SimpleNamespace(
        auto_scale_lr=dict(base_batch_size=16, enable=enable),
        optim_wrapper=wrapper,
        cfg=SimpleNamespace(train_dataloader=dict(batch_size=32)),
        _train_dataloader=dict(batch_size=32),
        world_size=2,
        logger=MMLogger.get_instance('mmengine'),
        param_schedulers=None,
    )
    scale_rates(runner)
    Runner.scale_lr(runner, wrapper, runner.auto_scale_lr)
    return [optimizer.param_groups[0]['lr'] for optimizer in optimizers]


@pytest.mark.parametrize(
    'kind, factor',
    [(torch.optim.SGD, 4), (NKFAC, 4), (torch.optim.AdamW, 2), (AdaNKFAC, 2)],
)
def test_kinds_of_rules(kind: Any, factor: int) -> None:
    model = nn.Linear(2, 2)
    params = model if kind in (NKFAC, AdaNKFAC) else model.parameters()
    assert scaled(kind(params, lr=0.1)) == pytest.approx([0.1 * factor])


def test_a_mixture_and_none() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    pair = torch.optim.SGD(first.parameters(), lr=0.1), torch.optim.AdamW(second.parameters(), 0.1)
    assert scaled(*pair) == pytest.approx([0.4, 0.2])
    assert scaled(torch.optim.AdamW(first.parameters(), 0.1), enable=False) == [0.1]


def test_rules_without_betas_and_accumulation() -> None:
    """AdaGrad divides by a root too; accumulated batches are a part of the step."""
    model = nn.Linear(2, 2)
    assert scaled(torch.optim.Adagrad(model.parameters(), lr=0.1)) == pytest.approx([0.2])
    assert scaled(AdaNKFAC(model, lr=0.1, rule='AdaGrad')) == pytest.approx([0.2])
    assert scaled(torch.optim.SGD(model.parameters(), lr=0.1), counts=4) == pytest.approx([1.6])
