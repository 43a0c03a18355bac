"""Captures and refreshes at doubling distances while weights are young."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mmprecond.optimizers import NKFAC
from tests.support.errors import refused


def counts(steps: int, **settings: Any) -> list[tuple[int, int]]:
    """Samples and refreshes after each step."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = NKFAC(model, lr=0.01, **settings)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        ((member,),) = (stack.members for stack in optimizer.curvature.stacks)
        found.append((member.samples, member.refreshes))
    return found


def steps_of(values: list[int]) -> list[int]:
    return [step for step, (old, new) in enumerate(zip([0, *values], values)) if new > old]


@pytest.mark.parametrize('early', [True, False])
def test_steps(early: bool) -> None:
    found = counts(26, stat_interval=5, refresh_interval=10, early_refreshes=early)
    samples, refreshes = (steps_of(list(part)) for part in zip(*found, strict=True))
    assert refreshes == ([0, 1, 2, 4, 8, 10, 20] if early else [0, 10, 20])
    assert samples == ([0, 1, 2, 4, 5, 8, 10, 15, 20, 25] if early else [0, 5, 10, 15, 20, 25])


def test_a_wrong_value_is_refused() -> None:
    refused(
        ValueError, lambda: NKFAC(nn.Linear(4, 3), lr=0.1, early_refreshes=1), 'early_refreshes=1'
    )
