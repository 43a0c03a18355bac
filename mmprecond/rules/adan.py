"""Adan: moments of the gradient and of its change."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from .adam import AdamW
from .base import Group, State, moments_of


class Adan(AdamW):
    """Adan: moments of the gradient, of its change, and of the gradient looked ahead.

    The change is c = g - g_before (0 at first). m, w and n are the moving averages of g, c and
    (g + beta2 c)^2; m', w' and n' are these averages after bias correction. The update is
    ``d = (m' + beta2 w') / (sqrt(n') + eps)``, applied as
    ``p <- (p - lr d) / (1 + lr weight_decay)``.

    Source: Adan (arXiv 2208.06677), Algorithm 1 without restart. Decays are weights of the old
    value, as in its code.
    """

    defaults = dict(betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0)
    linear_moments = ('exp_avg', 'exp_avg_diff', 'previous')

    def __init__(self) -> None:
        super().__init__()

    def key(self, group: Group, state: State) -> Hashable:
        return super().key(group, state), _first_beta(group)

    def check_state(self, param: Tensor, state: State, group: Group) -> None:
        """Raises ValueError for the state of another Adan, which has other names."""
        super().check_state(param, state, group)
        missing = [name for name in ('step', *self.linear_moments) if name not in state]
        if missing:
            raise ValueError(
                f'the state has no {", ".join(missing)}, so it is not of this Adan; start afresh '
                'from the weights alone'
            )

    def complete(self, group: Group, defaults: Group) -> Group:
        """With the first beta as 'momentum', the entry that schedulers of momentum change."""
        betas = group['betas'] if 'betas' in group else defaults['betas']
        return {**group, 'momentum': betas[0]} if isinstance(betas, (tuple, list)) else group

    def compute_updates(
        self, params: list[Tensor], directions: list[Tensor], states: list[State], group: Group
    ) -> list[Tensor]:
        beta1, (_, beta2, beta3) = _first_beta(group), group['betas']
        step = states[0].get('step', 0) + 1
        for state, gradient in zip(states, directions, strict=True):
            state['step'] = step
            if 'previous' not in state:
                state['previous'] = gradient.clone()
        first = moments_of(states, 'exp_avg', params)
        change = moments_of(states, 'exp_avg_diff', params)
        second = moments_of(states, 'exp_avg_sq', params)
        previous = [state['previous'] for state in states]
        difference = torch._foreach_sub(directions, previous)
        ahead = torch._foreach_add(directions, difference, alpha=beta2)
        torch._foreach_copy_(previous, directions)
        torch._foreach_lerp_(first, directions, 1 - beta1)
        torch._foreach_lerp_(change, list(difference), 1 - beta2)
        torch._foreach_mul_(second, beta3)
        torch._foreach_addcmul_(second, ahead, ahead, 1 - beta3)
        scale = torch._foreach_sqrt(second)
        torch._foreach_div_(scale, (1 - beta3**step) ** 0.5)
        torch._foreach_add_(scale, group['eps'])
        total = torch._foreach_div(first, 1 - beta1**step)
        torch._foreach_add_(total, change, alpha=beta2 / (1 - beta2**step))
        return list(torch._foreach_div(total, scale))

    def apply_updates(
        self, params: list[Tensor], updates: list[Tensor], states: list[State], group: Group
    ) -> None:
        torch._foreach_add_(params, updates, alpha=-group['lr'])
        torch._foreach_div_(params, 1 + group['lr'] * group['weight_decay'])


def _first_beta(group: Group) -> float:
    """The first beta: 'momentum' where a scheduler of MMEngine, which notes its start, sets it."""
    return float(group['momentum'] if 'initial_momentum' in group else group['betas'][0])
