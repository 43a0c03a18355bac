"""AdamR: whole trajectories against a slow reference in float64, and what holds of each step."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_checkpoint import differences, everything, saved, warnings_of
from test_trajectory import Convs, Tokens, follow, make_loss
from test_trajectory import batch as rows
from torch import Tensor, nn

from helpers import ConvNet, TokenNet, squared_error
from mmprecond.optimizers import AdamR, Preconditioned, PreconditionedOptimizer
from mmprecond.preconditioners import EigenRotation, RefreshError
from reference.factors import Loss, plain_copy
from reference.rotation import ReferenceRotation

ADAMW = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
ADAN = dict(lr=0.01, betas=(0.8, 0.7, 0.95), eps=1e-6, weight_decay=0.1, rule='Adan')
RULES = {'AdamW': ADAMW, 'Adan': ADAN}
EVERY = dict(stat_interval=1, refresh_interval=1)
SECOND = dict(stat_interval=2, refresh_interval=4)


def both(make: Callable[[], nn.Module], rule: dict[str, Any] = ADAMW,
         overrides: dict[str, dict[str, Any]] | None = None, **settings: Any
         ) -> tuple[nn.Module, PreconditionedOptimizer, ReferenceRotation]:
    torch.manual_seed(0)
    model = make().double()
    settings = EVERY | settings
    reference = ReferenceRotation(plain_copy(model), **rule, **settings, overrides=overrides)
    groups = [dict(params=[p], **(overrides or {}).get(name, {}))
              for name, p in model.named_parameters()]
    return model, AdamR(groups, model=model, **rule, **settings), reference


def batches(make: Any, size: int = 16) -> Callable[[int], list[Loss]]:
    """Batches so large that all second moments have full rank."""
    def losses(step: int) -> list[Loss]:
        generator = torch.Generator().manual_seed(step)
        shape = (size, 3, 5, 6) if make is ConvNet else (size, 4, 16)
        x = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3
        y = torch.randint(0, 10, (size,), generator=generator)
        return [lambda model: squared_error(model(x), y)]

    return losses


def tokens(step: int, **kwargs: Any) -> list[Loss]:
    return [make_loss(rows(step, 12, 6), **kwargs)]


def entry(optimizer: PreconditionedOptimizer, name: str) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict()['precond']['layers'][name])


# ------------------------------------------------------------------- trajectories

@pytest.mark.parametrize('rotate', [True, False], ids=['turned', 'thesis'])
@pytest.mark.parametrize('solver', ['eigh', 'qr'])
@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('intervals', [(1, 1), (2, 4), (3, 6)], ids=str)
@pytest.mark.parametrize('make', [ConvNet, TokenNet])
def test_trajectories(make: Any, intervals: tuple[int, int], rule: str, solver: str,
                      rotate: bool) -> None:
    """Through three bases and a step more, or two for the longest intervals."""
    stat, refresh = intervals
    model, optimizer, reference = both(make, RULES[rule], stat_interval=stat, basis_solver=solver,
                                       refresh_interval=refresh, rotate_moments=rotate)
    follow(model, optimizer, reference, batches(make), 2 * refresh + max(2, 6 - refresh))
    assert all(e['refreshes'] >= 2 for e in optimizer.state_dict()['precond']['layers'].values())
