"""AdamR beside its reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmprecond.optimizers import AdamR, PreconditionedOptimizer
from tests.reference.factors import Loss, plain_copy
from tests.reference.rotation import ReferenceRotation
from tests.support.trajectories import batch as rows
from tests.support.trajectories import make_loss

ADAMW = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1)
ADAN = dict(lr=0.01, betas=(0.8, 0.7, 0.95), eps=1e-4, weight_decay=0.1, rule='Adan')
RULES = {'AdamW': ADAMW, 'Adan': ADAN}
MORE_RULES = {
    'AdaGrad': dict(lr=0.01, eps=1e-4, weight_decay=0.1, rule='AdaGrad'),
    'RAdam': ADAMW | dict(rule='RAdam'),
    'AdaBelief': ADAMW | dict(rule='AdaBelief'),
}
EVERY = dict(stat_interval=1, refresh_interval=1)
SECOND = dict(stat_interval=2, refresh_interval=4)
#: The thesis has no early refreshes.
LATE = dict(early_refreshes=False)


def both(
    make: Callable[[], nn.Module],
    rule: dict[str, Any] = ADAMW,
    overrides: dict[str, dict[str, Any]] | None = None,
    **settings: Any,
) -> tuple[nn.Module, PreconditionedOptimizer, ReferenceRotation]:
    torch.manual_seed(0)
    model = make().double()
    settings = EVERY | settings
    reference = ReferenceRotation(plain_copy(model), **rule, **settings, overrides=overrides)
    groups = [
        dict(params=[p], **(overrides or {}).get(name, {})) for name, p in model.named_parameters()
    ]
    return model, AdamR(groups, model=model, **rule, **settings, **LATE), reference


def tokens(step: int, **kwargs: Any) -> list[Loss]:
    return [make_loss(rows(step, 12, 6), **kwargs)]


def entry(optimizer: PreconditionedOptimizer, name: str) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict()['precond']['layers'][name])


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        for loss in tokens(step):
            loss(model).backward()
        optimizer.step()


def equals(model: nn.Module, other: nn.Module, atol: float = 1e-12) -> bool:
    return all(
        torch.allclose(a, b, rtol=0, atol=atol)
        for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Tensor]:
    """By how much one step moves each parameter."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(model, optimizer, range(step, step + 1))
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}
