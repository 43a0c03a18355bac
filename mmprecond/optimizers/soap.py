"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..preconditioners import GradientRotation
from .families import PreconditionedAdam


class SOAP(PreconditionedAdam):
    """An adaptive rule in the eigenbasis of the gradient matrix's second moments.

    Source: SOAP (arXiv 2409.11321). It needs no hooks. The first step of a layer makes no update
    (see `GradientRotation`, whose settings it takes). As in AdamW, eps is added after the bias
    correction, and weight decay comes before the update. In SOAP's code both are the other way
    round.

    Args:
        params: Parameters or groups, with `model`; or the module itself.
        lr: Learning rate.
        betas: Decays of the moments; default: as for `PreconditionedAdam`, and (0.95, 0.95), as in
            SOAP's code, with ``settings='published'``.
        eps: Added to the root of the second moment; default: as for `PreconditionedAdam`.
        weight_decay: Decoupled weight decay.
        model: The module that owns the parameters.
        rule: As for `PreconditionedAdam`.
        **settings: Settings of `GradientRotation` and of `PreconditionedOptimizer`.
    """

    preconditioner = GradientRotation
    published: ClassVar[dict[str, Any]] = dict(betas=(0.95, 0.95))

    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        betas: tuple[float, ...] | None = None,
        eps: float | None = None,
        weight_decay: float = 0.01,
        *,
        model: nn.Module | None = None,
        rule: str = 'AdamW',
        **settings: Any,
    ) -> None:
        if betas is None and rule == 'AdamW' and settings.get('settings') == 'published':
            betas = self.published['betas']
        super().__init__(params, lr, betas, eps, weight_decay, model=model, rule=rule, **settings)
