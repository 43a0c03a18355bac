"""Rules: how a (preconditioned) gradient becomes an update.

A rule first turns gradients into directions, keeping its moments, then moves the parameters. In
between a rotation may turn the directions back. Both work on lists of tensors that share their
hyper-parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, check_number

State = dict[str, Any]
Group = dict[str, Any]

DECAYS = ('decoupled', 'published')


class Rule(ABC):
    """A first-order rule.

    Attributes:
        hyper: Names of the group entries that the rule reads.
    """

    hyper: ClassVar[tuple[str, ...]] = ()

    def key(self, group: Group, state: State) -> Hashable:
        """Parameters with equal keys are updated together."""
        return (*(group[name] for name in self.hyper), state.get('step'))

    @staticmethod
    def check(group: Group) -> None:
        """Raises ValueError for a group's bad hyper-parameters."""
        for name in ('lr', 'weight_decay'):
            check_number(name, group[name])

    @abstractmethod
    def directions(self, params: list[Tensor], gradients: list[Tensor], states: list[State],
                   group: Group) -> list[Tensor]:
        """Directions, shaped like the parameters; may alias the states' moments."""

    @abstractmethod
    def update(self, params: list[Tensor], directions: list[Tensor], states: list[State],
               group: Group) -> None:
        """Moves the parameters along -directions, in place."""


class SGDM(Rule):
    """SGD with heavy-ball momentum; weight decay is added after preconditioning.

    ``d = V + weight_decay p; buf = momentum buf + d; p -= lr buf``
    """

    hyper = ('lr', 'momentum', 'weight_decay')

    @staticmethod
    def check(group: Group) -> None:
        Rule.check(group)
        check_number('momentum', group['momentum'], high=1)

    def directions(self, params: list[Tensor], gradients: list[Tensor], states: list[State],
                   group: Group) -> list[Tensor]:
        if group['weight_decay']:
            gradients = list(torch._foreach_add(gradients, params, alpha=group['weight_decay']))
        if not group['momentum']:
            return gradients
        buffers = _moments(states, 'momentum_buffer', params)
        torch._foreach_mul_(buffers, group['momentum'])
        torch._foreach_add_(buffers, gradients)
        return buffers

    def update(self, params: list[Tensor], directions: list[Tensor], states: list[State],
               group: Group) -> None:
        torch._foreach_add_(params, directions, alpha=-group['lr'])


class AdamW(Rule):
    """Adam with weight decay apart from the moments.

    ``d = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)``, then ``p -= lr d`` and decay by
    lr weight_decay p ('decoupled', as torch) or lr / (1 - beta1^t) weight_decay p ('published': ten
    times as much at the first step, as in the code of AdaNKFAC and AdaBK).

    Args:
        decay: 'decoupled' or 'published'.
    """

    hyper = ('lr', 'betas', 'eps', 'weight_decay')

    def __init__(self, decay: str = 'decoupled') -> None:
        check_choice('decay', decay, DECAYS)
        self.decay = decay

    def key(self, group: Group, state: State) -> Hashable:
        return super().key({**group, 'betas': tuple(group['betas'])}, state)

    @staticmethod
    def check(group: Group) -> None:
        Rule.check(group)
        check_number('eps', group['eps'])
        if not isinstance(group['betas'], (tuple, list)) or len(group['betas']) != 2:
            raise ValueError(f'betas={group["betas"]!r} is not a pair; write betas=(0.9, 0.999)')
        for beta in group['betas']:
            check_number('betas', beta, high=1)

    def directions(self, params: list[Tensor], gradients: list[Tensor], states: list[State],
                   group: Group) -> list[Tensor]:
        beta1, beta2 = group['betas']
        step = states[0].get('step', 0) + 1
        first = _moments(states, 'exp_avg', params)
        second = _moments(states, 'exp_avg_sq', params)
        for state in states:
            state['step'] = step
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        scale = torch._foreach_sqrt(second)
        torch._foreach_div_(scale, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(scale, group['eps'])
        torch._foreach_mul_(scale, 1 - beta1**step)
        return list(torch._foreach_div(first, scale))

    def update(self, params: list[Tensor], directions: list[Tensor], states: list[State],
               group: Group) -> None:
        decay = group['lr'] * group['weight_decay']
        if self.decay == 'published':
            decay /= 1 - group['betas'][0] ** states[0]['step']
        if decay:
            torch._foreach_mul_(params, 1 - decay)
        torch._foreach_add_(params, directions, alpha=-group['lr'])


def _moments(states: list[State], name: str, params: list[Tensor]) -> list[Tensor]:
    for state, param in zip(states, params, strict=True):
        if name not in state:
            state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return [state[name] for state in states]
