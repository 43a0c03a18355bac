"""Rotation of moments into new bases, where it goes wrong most easily."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import mmprecond
from mmprecond.optimizers import SOAP, Preconditioned
from mmprecond.rules import AdamW, register_rule

LR = 1e-3


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 16)


def gradient(step: int) -> Tensor:
    """A gradient whose first four inputs are dead."""
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(16, 16, generator=generator) + 0.3) * (torch.arange(16) > 3)


def largest_move(
    model: nn.Linear, optimizer: Any, steps: range, make: Callable[[int], Tensor] = gradient
) -> float:
    """Largest root mean square of a step's change, in units of the learning rate."""
    moves = []
    for step in steps:
        model.weight.grad = make(step)
        before = model.weight.detach().clone()
        optimizer.step()
        moves.append(float((model.weight - before).detach().square().mean().sqrt()) / LR)
    assert max(moves) > 0.1
    return max(moves)


@pytest.mark.parametrize('settings', [{}, dict(settings='published')])
def test_a_late_first_basis_takes_no_leap(settings: dict[str, Any]) -> None:
    """Second moments of plain coordinates are zero where the rotated gradient is not."""
    model = layer()
    optimizer = SOAP(model, lr=LR, start_step=50, **settings)
    assert largest_move(model, optimizer, range(60)) < 1.5


def test_the_moments_of_torchs_adamw_go_on_without_a_leap() -> None:
    model = layer()
    plain = torch.optim.AdamW(model.parameters(), lr=LR)
    largest_move(model, plain, range(50))
    optimizer = mmprecond.precondition(model, plain, 'SOAP')
    assert largest_move(model, optimizer, range(50, 60)) < 1.5


@pytest.mark.parametrize('basis_solver', ['qr', 'eigh'])
def test_an_early_basis_after_a_zero_gradient_takes_no_leap(basis_solver: str) -> None:
    def make(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        return torch.randn(16, 16, generator=generator) * (step not in (2, 3, 4))

    model = layer()
    optimizer = SOAP(model, lr=LR, basis_solver=basis_solver)
    assert largest_move(model, optimizer, range(10), make) < 1.5


def test_a_weight_without_moments_is_left_out_of_the_checkpoint() -> None:
    """The second layer waits in the first step, and has no gradient when its basis comes."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5)])
    optimizer = SOAP(model, lr=LR, rule='Adan')
    for used in (2, 1):
        optimizer.zero_grad()
        sum(part(torch.randn(8, 6)) for part in model[:used]).square().mean().backward()
        optimizer.step()
    saved = optimizer.state_dict()
    SOAP(model, lr=LR, rule='Adan').load_state_dict(saved)
    assert set(saved['state']) == {0, 1, 3}  # weight and bias, and the other layer's bias


@pytest.mark.usefixtures('registries_as_they_were')
def test_a_moment_that_a_rule_does_not_keep_stops_no_rotation() -> None:
    class Sparing(AdamW):
        """AdamW with a further second moment, which it never makes."""

        quadratic_moments: ClassVar[tuple[str, ...]] = ('exp_avg_sq', 'max_exp_avg_sq')

        def check_state(self, *args: Any) -> None:
            """Takes all states."""

    register_rule(Sparing)
    results = []
    for name in ('AdamW', 'Sparing'):
        model = layer()
        optimizer = Preconditioned(model, rule=dict(type=name, lr=LR), layers='SOAP')
        largest_move(model, optimizer, range(15))
        results.append(model.weight.detach())
    assert torch.equal(*results)
