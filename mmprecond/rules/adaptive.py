"""Elementwise adaptive rules beside AdamW and Adan; their weight decay is decoupled."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad
from torch.optim.radam import radam

from ..checks import check_number
from .adam import AdamW
from .base import Group, Rule, State, moments_of, move_decoupled


class AdaBelief(AdamW):
    """AdaBelief: Adam with the second moment of ``g - m`` in place of that of g.

    With the direction g and m as in `AdamW`, ``s = beta2 s + (1 - beta2) (g - m)^2 + eps`` takes
    the place of v. eps is added to the root too.

    Source: AdaBelief (arXiv 2010.07468), Algorithm 2 and its code, without rectification.
    """

    defaults = dict(betas=(0.9, 0.999), eps=1e-16, weight_decay=0.0)
    quadratic_moments: ClassVar[tuple[str, ...]] = ('exp_avg_var',)

    def __init__(self) -> None:
        super().__init__()

    def moments(
        self, params: list[Tensor], directions: list[Tensor], states: list[State], group: Group
    ) -> tuple[list[Tensor], list[Tensor], int]:
        first, second, step = super().moments(params, directions, states, group)
        torch._foreach_add_(second, group['eps'])
        return first, second, step

    def deviations(self, directions: list[Tensor], first: list[Tensor]) -> list[Tensor]:
        """Returns ``g - m``."""
        return list(torch._foreach_sub(directions, first))


class RAdam(AdamW):
    """RAdam: the plain momentum in the first steps, and a rectified step of Adam later.

    Source: RAdam (arXiv 1908.03265), Algorithm 2, in torch's implementation.
    """

    def __init__(self) -> None:
        super().__init__()

    def compute_updates(
        self, params: list[Tensor], directions: list[Tensor], states: list[State], group: Group
    ) -> list[Tensor]:
        step = states[0].get('step', 0)
        for state in states:
            state['step'] = step + 1
        negative_updates = [torch.zeros_like(p) for p in params]
        beta1, beta2 = group['betas']
        radam(
            negative_updates,
            directions,
            moments_of(states, 'exp_avg', params),
            moments_of(states, 'exp_avg_sq', params),
            [torch.tensor(float(step), dtype=torch.float32) for _ in params],
            foreach=True,
            beta1=beta1,
            beta2=beta2,
            lr=1.0,
            weight_decay=0.0,
            eps=group['eps'],
        )
        return list(torch._foreach_neg(negative_updates))


class AdaGrad(Rule):
    """AdaGrad: directions divided by the root of the sum of their squares.

    Source: AdaGrad (Duchi et al., JMLR 2011), diagonal form, in torch's implementation.
    """

    hyper: ClassVar[tuple[str, ...]] = ('lr', 'eps', 'weight_decay')
    defaults = dict(eps=1e-10, weight_decay=0.0)
    quadratic_moments: ClassVar[tuple[str, ...]] = ('sum',)
    elementwise: ClassVar[bool] = True

    @classmethod
    def check(cls, group: Group) -> None:
        super().check(group)
        check_number('eps', group['eps'])

    def compute_updates(
        self, params: list[Tensor], directions: list[Tensor], states: list[State], group: Group
    ) -> list[Tensor]:
        negative_updates = [torch.zeros_like(p) for p in params]
        adagrad(
            negative_updates,
            directions,
            moments_of(states, 'sum', params),
            [torch.zeros((), dtype=torch.float32) for _ in params],
            foreach=True,
            has_sparse_grad=False,
            lr=1.0,
            weight_decay=0.0,
            lr_decay=0.0,
            eps=group['eps'],
            maximize=False,
        )
        return list(torch._foreach_neg(negative_updates))

    def apply_updates(
        self, params: list[Tensor], updates: list[Tensor], states: list[State], group: Group
    ) -> None:
        move_decoupled(params, updates, group)
