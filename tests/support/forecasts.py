"""Forecasts of cost beside what training then takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmprecond.core.cost import measured_costs
from mmprecond.optimizers import PreconditionedOptimizer


def product(total: Any, first: Any, second: Any, *_: Any, **__: Any) -> int:
    return 2 * torch.Size(first).numel() * second[-1]


IN_PLACE = {torch.ops.aten.baddbmm_: product, torch.ops.aten.addmm_: product}


def counted(function: Any) -> float:
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        function()
    return float(counter.get_total_flops())


def held(optimizer: PreconditionedOptimizer) -> float:
    tensors = [
        t
        for stack in optimizer.curvature.stacks
        for t in (*stack.statistics.values(), *stack.operator_tensors.values())
    ]
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def total(costs: Any, name: str) -> float:
    return sum(getattr(cost, name) for cost in costs)


def compare(
    kind: type[PreconditionedOptimizer], model: nn.Module, inputs: tuple[Any, ...], **options: Any
) -> None:
    """The forecast against what captures, steps and stacks then take."""
    optimizer = kind(model, lr=0.01, stat_interval=3, refresh_interval=3, **options)
    with (
        measured_costs(optimizer.curvature.layers, optimizer.curvature.capture) as found,
        torch.no_grad(),
    ):
        model(*inputs)
    costs = list(found.values())

    def backward() -> None:
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()

    passes, steps = [], []
    for _ in range(5):
        passes.append(counted(backward))
        steps.append(counted(optimizer.step))
    assert total(costs, 'refresh') > 0 and all(cost.calls == 1 for cost in costs)
    assert max(passes) - min(passes) == pytest.approx(total(costs, 'capture'), rel=0.2)
    assert steps[-1] == pytest.approx(total(costs, 'apply'), rel=0.2)
    assert held(optimizer) == pytest.approx(total(costs, 'megabytes'), rel=1e-6)
