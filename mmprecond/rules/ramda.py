"""RAMDA: dual averaging with momentum, and a proximal step that sets whole filters to zero."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_count, check_flag, check_number
from ..linalg import at_least_float32, shrink_rows
from .base import Group, Rule, State


class RAMDARule(Rule):
    """Regularized adaptive momentum dual averaging with the group lasso of filters.

    A filter is a row of a weight in its first dimension. In step t of a round, with the direction
    g, the weight ``s = lr sqrt(t)``, and sums that start at zero::

        a += s;  S += s g;  Q += s g^2;  D = Q^(1/3) + eps
        u = argmin_x S' x + (x - p0)' D (x - p0) / 2 + a group_lasso sum_f sqrt(n_f) |x_f|
        p = (1 - momentum) p + momentum u

    over the filters f with n_f entries. p0 is p at the start of the round. Parameters without
    filters, and those with group_lasso 0, have ``u = p0 - S / D``. The state is in float32 at
    least. A round ends when lr has fallen to `restart` of its largest value in the round; eps then
    falls by the same factor.

    Filters of p are exactly zero once they are zero in u and the momentum is 1. If the number of
    steps of the run is known (`total_steps`), the momentum rises linearly to 1 in the last part of
    it; the source raises it after its last milestone.

    Source: RAMDA (arXiv 2403.14398), Algorithms 1 and 2, and its code. Its inexact proximal
    gradient steps are replaced by the exact minimizer (see `shrink_rows`).

    Args:
        prune_matrices: Whether rows of matrices are filters too; default False.
        restart: A round ends when lr falls to this share of its largest value in the round; default
            0.1. The source restarts at each milestone.
        rise: Share of the run, at its end, in which the momentum rises; default: a third.
        total_steps: Number of optimizer steps of the run, or None (default) if it is unknown.
    """

    hyper: ClassVar[tuple[str, ...]] = ('lr', 'momentum', 'group_lasso', 'eps', 'weight_decay')
    defaults: ClassVar[dict[str, Any]] = dict(
        momentum=0.1, group_lasso=1e-4, eps=1e-6, weight_decay=0.0
    )
    exact: ClassVar[tuple[str, ...]] = ('start', 'sum', 'squares')
    scales_by_rate: ClassVar[bool] = False

    def __init__(
        self,
        prune_matrices: bool = False,
        restart: float = 0.1,
        rise: float = 1 / 3,
        total_steps: int | None = None,
    ) -> None:
        check_flag('prune_matrices', prune_matrices)
        check_number('restart', restart, high=1)
        check_number('rise', rise)
        if total_steps is not None:
            check_count('total_steps', total_steps)
        self.prune_matrices, self.restart, self.rise = prune_matrices, restart, rise
        self.total_steps = total_steps

    @classmethod
    def check(cls, group: Group) -> None:
        super().check(group)
        check_number('momentum', group['momentum'], open_low=True)
        if group['momentum'] > 1 + 1e-6:  # schedules round
            raise ValueError(
                f'momentum={group["momentum"]} is above 1; 1 is none, and less is more of it'
            )
        check_number('group_lasso', group['group_lasso'])
        check_number('eps', group['eps'], open_low=True)

    def key(self, group: Group, state: State) -> Hashable:
        names = ('taken', 'weight_sum', 'highest', 'eps_share')
        return super().key(group, state), *(state.get(name) for name in names)

    def has_filters(self, param: Tensor, group: Group) -> bool:
        """True if the filters of a parameter are regularized."""
        return bool(group['group_lasso']) and param.ndim >= (2 if self.prune_matrices else 3)

    def compute_updates(
        self, params: list[Tensor], directions: list[Tensor], states: list[State], group: Group
    ) -> list[Tensor]:
        dtypes = [at_least_float32(p.dtype) for p in params]
        params = [p.to(dtype) for p, dtype in zip(params, dtypes, strict=True)]
        directions = [d.to(dtype) for d, dtype in zip(directions, dtypes, strict=True)]
        if group['weight_decay']:
            directions = list(torch._foreach_add(directions, params, alpha=group['weight_decay']))
        self._continue_round(params, states, group['lr'])
        step = states[0]['step']
        scale = group['lr'] * math.sqrt(step)
        total = states[0]['weight_sum'] + scale
        for state in states:
            state['weight_sum'] = total
        sums, squares = ([state[name] for state in states] for name in ('sum', 'squares'))
        torch._foreach_add_(sums, directions, alpha=scale)
        torch._foreach_addcmul_(squares, directions, directions, scale)
        diagonals = torch._foreach_pow(squares, 1 / 3)
        torch._foreach_add_(diagonals, group['eps'] * states[0]['eps_share'])
        targets = [
            self._target(p, state, diagonal, total * group['group_lasso'], group)
            for p, state, diagonal in zip(params, states, diagonals, strict=True)
        ]
        updates = torch._foreach_sub(params, targets)
        torch._foreach_mul_(updates, self.momentum_at(states[0]['taken'], group['momentum']))
        return list(updates)

    def plan_steps(self, count: int | None) -> None:
        """Sets the number of optimizer steps of the run; None if it is unknown."""
        self.total_steps = count

    def momentum_at(self, step: int, momentum: float) -> float:
        """Momentum of a step of the run, counted from 1."""
        if self.total_steps is None:
            return min(momentum, 1.0)
        start = (1 - self.rise) * self.total_steps
        risen = (step - start) / max(self.total_steps - start, 1.0)
        return min(momentum + (1 - momentum) * max(risen, 0.0), 1.0)

    def _continue_round(self, params: list[Tensor], states: list[State], rate: float) -> None:
        """Counts a step of the round, or starts another one."""
        highest = max(states[0].get('highest', 0.0), rate)
        fallen = rate <= self.restart * highest
        begins = 'step' not in states[0] or (fallen and rate > 0)
        for p, state in zip(params, states, strict=True):
            share = state.get('eps_share', 1.0)
            if begins:
                state['eps_share'] = share * rate / highest if 'step' in state else 1.0
                state['start'] = p.detach().clone(memory_format=torch.preserve_format)
                state['sum'], state['squares'] = torch.zeros_like(p), torch.zeros_like(p)
                state['step'], state['weight_sum'] = 0, 0.0
            state['highest'] = rate if begins else highest
            state['step'] += 1
            state['taken'] = state.get('taken', 0) + 1

    def _target(
        self, param: Tensor, state: State, diagonal: Tensor, weight: float, group: Group
    ) -> Tensor:
        """Target u of one parameter."""
        if not self.has_filters(param, group):
            return state['start'] - state['sum'] / diagonal
        rows = len(param)
        linear = (diagonal * state['start'] - state['sum']).reshape(rows, -1)
        size = math.sqrt(linear.shape[1])
        return shrink_rows(linear, diagonal.reshape(rows, -1), weight * size).view_as(param)

    def notes(self, groups: list[Group], names: Mapping[Tensor, str]) -> list[str]:
        if self.total_steps is not None:
            return []
        return [
            'RAMDA does not know the length of the run, so its momentum never rises and no filter '
            "becomes exactly zero: write rule=dict(type='RAMDA', total_steps=...)"
        ]

    def apply_updates(
        self, params: list[Tensor], updates: list[Tensor], states: list[State], group: Group
    ) -> None:
        torch._foreach_sub_(params, [u.to(p.dtype) for p, u in zip(params, updates, strict=True)])
