"""Stochastic gradient descent: heavy-ball momentum, or a moving average."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..checks import check_choice, check_flag, check_number
from .base import Group, Rule, State, moments_of, move_decoupled


class SGDM(Rule):
    """SGD with heavy-ball momentum; weight decay is added after preconditioning.

    For the direction V: ``d = V + weight_decay p; buf = momentum buf + d; p -= lr buf``.

    Args:
        nesterov: Whether the update is ``p -= lr (d + momentum buf)``, as in torch.
    """

    hyper = ('lr', 'momentum', 'weight_decay')
    defaults = dict(momentum=0.9, weight_decay=0.0)
    linear_moments = ('momentum_buffer',)

    def __init__(self, nesterov: bool = False) -> None:
        check_flag('nesterov', nesterov)
        self.nesterov = nesterov

    @classmethod
    def check(cls, group: Group) -> None:
        super().check(group)
        check_number('momentum', group['momentum'], high=1)

    def compute_updates(
        self, params: list[Tensor], directions: list[Tensor], states: list[State], group: Group
    ) -> list[Tensor]:
        decay = group['weight_decay']
        if not group['momentum']:
            decayed = torch._foreach_add(directions, params, alpha=decay) if decay else directions
            return list(decayed)
        buffers = moments_of(states, 'momentum_buffer', params)
        torch._foreach_mul_(buffers, group['momentum'])
        torch._foreach_add_(buffers, directions)
        if decay:
            torch._foreach_add_(buffers, params, alpha=decay)
        if not self.nesterov:
            return buffers
        updates = torch._foreach_add(directions, buffers, alpha=group['momentum'])
        if decay:
            torch._foreach_add_(updates, params, alpha=decay)
        return list(updates)

    def apply_updates(
        self, params: list[Tensor], updates: list[Tensor], states: list[State], group: Group
    ) -> None:
        torch._foreach_add_(params, updates, alpha=-group['lr'])


class EMASGD(Rule):
    """SGD on the bias-corrected moving average of the directions.

    For the direction g: ``m = momentum m + (1 - momentum) g; d = m / (1 - momentum^t)``, then
    ``p -= lr d``.

    Args:
        decay: Weight decay. 'decoupled': lr weight_decay p, outside the average. 'added':
            weight_decay p, added to the direction.
    """

    hyper = ('lr', 'momentum', 'weight_decay')
    defaults = dict(momentum=0.9, weight_decay=0.0)
    linear_moments = ('exp_avg',)

    def __init__(self, decay: str = 'decoupled') -> None:
        check_choice('decay', decay, ('decoupled', 'added'))
        self.decay = decay
        self._averaged: set[Tensor] | None = None

    def average_only(self, params: Iterable[Tensor]) -> None:
        """Averages the directions of these parameters only; all others are not averaged."""
        self._averaged = set(params)

    @classmethod
    def check(cls, group: Group) -> None:
        super().check(group)
        check_number('momentum', group['momentum'], high=1)

    def compute_updates(
        self, params: list[Tensor], directions: list[Tensor], states: list[State], group: Group
    ) -> list[Tensor]:
        if self.decay == 'added' and group['weight_decay']:
            directions = list(torch._foreach_add(directions, params, alpha=group['weight_decay']))
        chosen = [k for k, p in enumerate(params) if self._averaged is None or p in self._averaged]
        if not chosen:
            return directions
        updates = list(directions)
        averages = moments_of([states[k] for k in chosen], 'exp_avg', [params[k] for k in chosen])
        torch._foreach_lerp_(averages, [directions[k] for k in chosen], 1 - group['momentum'])
        step = states[chosen[0]].get('step', 0) + 1  # equal steps are in the key
        corrected = torch._foreach_div(averages, 1 - group['momentum'] ** step)
        for k, update in zip(chosen, corrected, strict=True):
            states[k]['step'] = step
            updates[k] = update
        return updates

    def apply_updates(
        self, params: list[Tensor], updates: list[Tensor], states: list[State], group: Group
    ) -> None:
        if self.decay == 'decoupled':
            move_decoupled(params, updates, group)
        else:
            torch._foreach_add_(params, updates, alpha=-group['lr'])
