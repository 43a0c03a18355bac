"""Shampoo: roots of the gradient matrix's second moments on both sides of a momentum."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..preconditioners import GradientRoot
from ..rules import EMASGD
from .families import PreconditionedSGDM


class Shampoo(PreconditionedSGDM):
    """Averaged gradients times L^-1/4 and R^-1/4, at the length of the average.

    It needs no hooks. Where a layer has no roots yet, it takes the averaged gradients themselves.

    Source: Shampoo (arXiv 1802.09568, Algorithm 1; arXiv 2002.09018 for grafting).

    Args:
        params: Parameters or groups, with `model`; or the module itself.
        lr: Learning rate.
        momentum: Decay of the gradients' average, whose start is corrected; default: 0.9, or none
            with ``settings='published'``.
        weight_decay: Decoupled weight decay.
        model: The module that owns the parameters.
        **settings: Settings of `GradientRoot` and of `PreconditionedOptimizer`.
            ``settings='published'`` starts from Algorithm 1.

    Raises:
        ValueError: If a value is out of range or the model is missing.
        TypeError: If a setting is unknown.
    """

    preconditioner = GradientRoot
    rule_type = EMASGD
    published: ClassVar[dict[str, Any]] = dict(momentum=0.0)

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float | None = None,
        weight_decay: float = 0.0,
        *,
        model: nn.Module | None = None,
        **settings: Any,
    ) -> None:
        if momentum is None:
            literal = settings.get('settings') == 'published'
            momentum = self.published['momentum'] if literal else EMASGD.defaults['momentum']
        super().__init__(params, lr, momentum, weight_decay, model=model, **settings)
