"""KFAC beside its reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mmprecond.optimizers import KFAC
from tests.reference.factors import Loss, plain_copy
from tests.reference.kfac import ReferenceKFAC
from tests.support.trajectories import SGD, make_loss
from tests.support.trajectories import batch as rows

STAR = dict(damping_form='relative', damping=0.01, scaling='norm_recovery')


def both(
    make: Callable[[], nn.Module],
    rule: dict[str, Any] = SGD,
    overrides: dict[str, dict[str, Any]] | None = None,
    **settings: Any,
) -> tuple[nn.Module, KFAC, ReferenceKFAC]:
    """KFAC and its reference; the root of the damping is exact in any dtype unless it is given."""
    torch.manual_seed(0)
    model = make().double()
    settings = dict(stat_interval=1, refresh_interval=1, damping=0.0625) | settings
    reference = ReferenceKFAC(plain_copy(model), **rule, overrides=overrides, **settings)
    groups = [
        dict(params=[p], **(overrides or {}).get(name, {})) for name, p in model.named_parameters()
    ]
    return model, KFAC(groups, model=model, **rule, **settings, settings='published'), reference


def tokens(step: int) -> list[Loss]:
    return [make_loss(rows(step, features=6))]
