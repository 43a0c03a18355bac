"""SGD whose 1-D parameters are divided by a diagonal of the Hessian."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from ..checks import check_choice
from .adam import DECAYS
from .base import Group, State, moments_of
from .sgd import SGDM


class PartialHessianSGDM(SGDM):
    """SGDM with tau (1 - momentum^n) buf / (d + eps) for parameters with a Hessian diagonal d.

    The momentum buf of these parameters is that of the plain gradient. Weight decay is added after
    the division.

    Args:
        rate: tau.
        eps: Added to the diagonal.
        decay: Weight decay of all other parameters. 'published' adds it to the direction, before
            the momentum. 'decoupled' adds it to the update, after the momentum.

    Attributes:
        cycle: n, the number of the cycle, in which each 1-D parameter is refreshed once, from 1;
            from the last step of a cycle on that of the next one, as in the published code.
    """

    def __init__(self, rate: float, eps: float, decay: str = 'published') -> None:
        super().__init__()
        check_choice('decay', decay, DECAYS)
        self.decay = decay
        self.rate = rate
        self.eps = eps
        self.cycle = 1

    def begin_cycle(self, number: int) -> None:
        """Sets the cycle of the next updates."""
        self.cycle = number

    def key(self, group: Group, state: State) -> Hashable:
        return super().key(group, state), 'hessian' in state

    def compute_updates(
        self, params: list[Tensor], directions: list[Tensor], states: list[State], group: Group
    ) -> list[Tensor]:
        if 'hessian' not in states[0]:
            return self._plain_updates(params, directions, states, group)
        buffers = moments_of(states, 'momentum_buffer', params)
        torch._foreach_mul_(buffers, group['momentum'])
        torch._foreach_add_(buffers, directions)
        damped = torch._foreach_add([state['hessian'] for state in states], self.eps)
        updates = torch._foreach_div(buffers, list(damped))
        torch._foreach_mul_(updates, self.rate * (1 - group['momentum'] ** self.cycle))
        torch._foreach_add_(updates, params, alpha=group['weight_decay'])
        return list(updates)

    def _plain_updates(
        self, params: list[Tensor], directions: list[Tensor], states: list[State], group: Group
    ) -> list[Tensor]:
        """Updates of parameters without a Hessian."""
        if self.decay == 'published':
            return super().compute_updates(params, directions, states, group)
        undecayed = {**group, 'weight_decay': 0.0}
        updates = super().compute_updates(params, directions, states, undecayed)
        return list(torch._foreach_add(updates, params, alpha=group['weight_decay']))
