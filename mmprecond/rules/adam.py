"""Adam with weight decay outside the moments."""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, check_number
from .base import Group, Rule, State, moments_of

DECAYS = ('decoupled', 'published')


class AdamW(Rule):
    """Adam with weight decay outside the moments.

    The update is ``d = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)``, applied as
    ``p -= lr d``. The decay of p is lr weight_decay p ('decoupled', as in torch), or
    lr / (1 - beta1^t) weight_decay p ('published', as in the code of AdaNKFAC and AdaBK). The
    latter is ten times as much at the first step.

    Args:
        decay: 'decoupled' or 'published'.
    """

    hyper: ClassVar[tuple[str, ...]] = ('lr', 'betas', 'eps', 'weight_decay')
    defaults = dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    linear_moments: ClassVar[tuple[str, ...]] = ('exp_avg',)
    quadratic_moments: ClassVar[tuple[str, ...]] = ('exp_avg_sq',)
    elementwise: ClassVar[bool] = True

    def __init__(self, decay: str = 'decoupled') -> None:
        check_choice('decay', decay, DECAYS)
        self.decay = decay

    def key(self, group: Group, state: State) -> Hashable:
        return super().key({**group, 'betas': tuple(group['betas'])}, state)

    @classmethod
    def check(cls, group: Group) -> None:
        super().check(group)
        check_number('eps', group['eps'])
        usual = cls.defaults['betas']
        if not isinstance(group['betas'], (tuple, list)) or len(group['betas']) != len(usual):
            raise ValueError(
                f'betas={group["betas"]!r} is not {len(usual)} numbers; write betas={usual}'
            )
        for beta in group['betas']:
            check_number('betas', beta, high=1)

    def check_state(self, param: Tensor, state: State, group: Group) -> None:
        """Raises ValueError if the state lacks moments of this rule, as another rule's does."""
        names = (*self.linear_moments, *self.quadratic_moments)
        super().check_state(param, state, group)
        missing = [name for name in names if 'step' in state and name not in state]
        if missing:
            raise ValueError(
                f'the state has no {", ".join(missing)}: it was saved with another rule than '
                f'{type(self).__name__}; start afresh from the weights alone'
            )

    def moments(
        self, params: list[Tensor], directions: list[Tensor], states: list[State], group: Group
    ) -> tuple[list[Tensor], list[Tensor], int]:
        """Updates the first and second moments; returns them and their number of steps."""
        beta1, beta2 = group['betas']
        step = states[0].get('step', 0) + 1
        first = moments_of(states, 'exp_avg', params)
        second = moments_of(states, self.quadratic_moments[0], params)
        for state in states:
            state['step'] = step
        torch._foreach_lerp_(first, directions, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        squared = self.deviations(directions, first)
        torch._foreach_addcmul_(second, squared, squared, 1 - beta2)
        return first, second, step

    def deviations(self, directions: list[Tensor], first: list[Tensor]) -> list[Tensor]:
        """Returns the tensors of which the second moment averages squares: the directions."""
        return directions

    def compute_updates(
        self, params: list[Tensor], directions: list[Tensor], states: list[State], group: Group
    ) -> list[Tensor]:
        first, second, step = self.moments(params, directions, states, group)
        beta1, beta2 = group['betas']
        scale = torch._foreach_sqrt(second)
        torch._foreach_div_(scale, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(scale, group['eps'])
        torch._foreach_mul_(scale, 1 - beta1**step)
        return list(torch._foreach_div(first, scale))

    def apply_updates(
        self, params: list[Tensor], updates: list[Tensor], states: list[State], group: Group
    ) -> None:
        decay = group['lr'] * group['weight_decay']
        if self.decay == 'published':
            decay /= 1 - group['betas'][0] ** states[0]['step']
        if decay:
            torch._foreach_mul_(params, 1 - decay)
        torch._foreach_add_(params, updates, alpha=-group['lr'])
