"""Rules: how a (preconditioned) gradient becomes an update.

A rule first turns gradients into directions, keeping its moments, then moves the parameters. In
between a rotation may turn the directions back. Both work on lists of tensors that share their
hyper-parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
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
        defaults: Their values where the user gives none; there is none for lr.
        linear_moments: Names of the moments that are sums of gradients.
        exact: Names of what is kept in a dtype of its own, which loading must not change.
    """

    hyper: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[dict[str, Any]] = {}
    linear_moments: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[tuple[str, ...]] = ()

    def key(self, group: Group, state: State) -> Hashable:
        """Parameters with equal keys are updated together."""
        return (*(group[name] for name in self.hyper), state.get('step'))

    @classmethod
    def check(cls, group: Group) -> None:
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

    def check_state(self, param: Tensor, state: State, group: Group) -> None:  # noqa: B027
        """Raises ValueError for a parameter's saved state that does not fit."""

    def notes(self, groups: list[Group], names: Mapping[Tensor, str]) -> list[str]:
        """What the log should say of parameters that the rule treats otherwise, in lines."""
        return []


class SGDM(Rule):
    """SGD with heavy-ball momentum; weight decay is added after preconditioning.

    ``d = V + weight_decay p; buf = momentum buf + d; p -= lr buf``
    """

    hyper = ('lr', 'momentum', 'weight_decay')
    defaults = dict(momentum=0.9, weight_decay=0.)
    linear_moments = ('momentum_buffer',)

    @classmethod
    def check(cls, group: Group) -> None:
        super().check(group)
        check_number('momentum', group['momentum'], high=1)

    def directions(self, params: list[Tensor], gradients: list[Tensor], states: list[State],
                   group: Group) -> list[Tensor]:
        decay = group['weight_decay']
        if not group['momentum']:
            return list(torch._foreach_add(gradients, params, alpha=decay)) if decay else gradients
        buffers = moments_of(states, 'momentum_buffer', params)
        torch._foreach_mul_(buffers, group['momentum'])
        torch._foreach_add_(buffers, gradients)
        if decay:
            torch._foreach_add_(buffers, params, alpha=decay)
        return buffers

    def update(self, params: list[Tensor], directions: list[Tensor], states: list[State],
               group: Group) -> None:
        torch._foreach_add_(params, directions, alpha=-group['lr'])


class EMASGD(Rule):
    """SGD on the bias-corrected moving average of the gradients.

    ``m = momentum m + (1 - momentum) g; d = m / (1 - momentum^t)``, then ``p -= lr d``.

    Args:
        decay: Of the weights: 'decoupled', lr weight_decay p apart from the average; 'added' to the
            gradient.

    Attributes:
        averaged: The parameters that are averaged; all others take their gradients as they are.
            None: all.
    """

    hyper = ('lr', 'momentum', 'weight_decay')
    defaults = dict(momentum=0.9, weight_decay=0.)
    linear_moments = ('exp_avg',)

    def __init__(self, decay: str = 'decoupled') -> None:
        check_choice('decay', decay, ('decoupled', 'added'))
        self.decay = decay
        self.averaged: set[Tensor] | None = None

    @classmethod
    def check(cls, group: Group) -> None:
        super().check(group)
        check_number('momentum', group['momentum'], high=1)

    def directions(self, params: list[Tensor], gradients: list[Tensor], states: list[State],
                   group: Group) -> list[Tensor]:
        if self.decay == 'added' and group['weight_decay']:
            gradients = list(torch._foreach_add(gradients, params, alpha=group['weight_decay']))
        chosen = [k for k, p in enumerate(params) if self.averaged is None or p in self.averaged]
        if not chosen:
            return gradients
        directions = list(gradients)
        averages = moments_of([states[k] for k in chosen], 'exp_avg', [params[k] for k in chosen])
        torch._foreach_lerp_(averages, [gradients[k] for k in chosen], 1 - group['momentum'])
        step = states[chosen[0]].get('step', 0) + 1  # equal steps are in the key
        corrected = torch._foreach_div(averages, 1 - group['momentum']**step)
        for k, direction in zip(chosen, corrected, strict=True):
            states[k]['step'] = step
            directions[k] = direction
        return directions

    def update(self, params: list[Tensor], directions: list[Tensor], states: list[State],
               group: Group) -> None:
        if self.decay == 'decoupled' and group['weight_decay']:
            torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
        torch._foreach_add_(params, directions, alpha=-group['lr'])


class AdamW(Rule):
    """Adam with weight decay apart from the moments.

    ``d = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)``, then ``p -= lr d`` and decay by
    lr weight_decay p ('decoupled', as torch) or lr / (1 - beta1^t) weight_decay p ('published': ten
    times as much at the first step, as in the code of AdaNKFAC and AdaBK).

    Args:
        decay: 'decoupled' or 'published'.
    """

    hyper: ClassVar[tuple[str, ...]] = ('lr', 'betas', 'eps', 'weight_decay')
    defaults = dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.)
    linear_moments: ClassVar[tuple[str, ...]] = ('exp_avg',)

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
            raise ValueError(f'betas={group["betas"]!r} is not {len(usual)} numbers; write '
                             f'betas={usual}')
        for beta in group['betas']:
            check_number('betas', beta, high=1)

    def moments(self, params: list[Tensor], gradients: list[Tensor], states: list[State],
                group: Group) -> tuple[list[Tensor], list[Tensor], int]:
        """Updates the first and second moments; returns them and the steps they have seen."""
        beta1, beta2 = group['betas']
        step = states[0].get('step', 0) + 1
        first = moments_of(states, 'exp_avg', params)
        second = moments_of(states, 'exp_avg_sq', params)
        for state in states:
            state['step'] = step
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        return first, second, step

    def directions(self, params: list[Tensor], gradients: list[Tensor], states: list[State],
                   group: Group) -> list[Tensor]:
        first, second, step = self.moments(params, gradients, states, group)
        beta1, beta2 = group['betas']
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


class Adan(AdamW):
    """Adan: moments of the gradient, of its change, and of the gradient looked ahead.

    With the change c = g - g_before (0 at first): m, w and n are the moving averages of g, c and
    (g + beta2 c)^2, ``d = (m' + beta2 w') / (sqrt(n') + eps)`` with the bias-corrected ones, then
    ``p <- (p - lr d) / (1 + lr weight_decay)``.

    Source: Adan (arXiv 2208.06677), Algorithm 1 without restart, with decays written as weights of
    the old value, as its code does.
    """

    defaults = dict(betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.)
    linear_moments = ('exp_avg', 'exp_avg_diff', 'previous')

    def __init__(self) -> None:
        super().__init__()

    def directions(self, params: list[Tensor], gradients: list[Tensor], states: list[State],
                   group: Group) -> list[Tensor]:
        beta1, beta2, beta3 = group['betas']
        step = states[0].get('step', 0) + 1
        for state, gradient in zip(states, gradients, strict=True):
            state['step'] = step
            if 'previous' not in state:
                state['previous'] = gradient.clone()
        first = moments_of(states, 'exp_avg', params)
        change = moments_of(states, 'exp_avg_diff', params)
        second = moments_of(states, 'exp_avg_sq', params)
        previous = [state['previous'] for state in states]
        difference = torch._foreach_sub(gradients, previous)
        ahead = torch._foreach_add(gradients, difference, alpha=beta2)
        torch._foreach_copy_(previous, gradients)
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_lerp_(change, list(difference), 1 - beta2)
        torch._foreach_mul_(second, beta3)
        torch._foreach_addcmul_(second, ahead, ahead, 1 - beta3)
        scale = torch._foreach_sqrt(second)
        torch._foreach_div_(scale, (1 - beta3**step) ** 0.5)
        torch._foreach_add_(scale, group['eps'])
        total = torch._foreach_div(first, 1 - beta1**step)
        torch._foreach_add_(total, change, alpha=beta2 / (1 - beta2**step))
        return list(torch._foreach_div(total, scale))

    def update(self, params: list[Tensor], directions: list[Tensor], states: list[State],
               group: Group) -> None:
        torch._foreach_add_(params, directions, alpha=-group['lr'])
        torch._foreach_div_(params, 1 + group['lr'] * group['weight_decay'])


def moments_of(states: list[State], name: str, params: list[Tensor]) -> list[Tensor]:
    """A moment of each parameter, made where it is missing."""
    for state, param in zip(states, params, strict=True):
        if name not in state:
            state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return [state[name] for state in states]
