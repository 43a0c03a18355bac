"""AdaAct: averaged gradients, divided by the root of the inputs' mean square."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..checks import check_number
from ..preconditioners import InputDiagonal
from ..rules import EMASGD
from .base import PreconditionedOptimizer
from .settings import split_settings


class AdaAct(PreconditionedOptimizer):
    """Moving average of the gradients, divided by the root of the inputs' mean square.

    Parameters without inputs (norms, tokens) take plain SGD without momentum, as in the published
    code. Weight decay is decoupled.

    Source: AdaAct (arXiv 2506.08353), with the bias corrections of its code.

    Args:
        params: Parameters or groups, with `model`; or the module itself.
        lr: Learning rate.
        betas: Decays of the gradients' average and of the mean square.
        eps: Added to the root of the mean square.
        weight_decay: Decoupled weight decay.
        model: The module that owns the parameters.
        **settings: Other settings of `InputDiagonal` and of `PreconditionedOptimizer`.
            ``settings='published'`` starts from those of the published code.

    Raises:
        ValueError: If a value is out of range or the model is missing.
        TypeError: If a setting is unknown.
    """

    preconditioner = InputDiagonal

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        model: nn.Module | None = None,
        **settings: Any,
    ) -> None:
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f'betas={betas!r} is not 2 numbers; write betas=(0.9, 0.999)')
        for beta in betas:
            check_number('betas', beta, high=1)
        settings = {'stat_decay': betas[1], 'eps': eps, **settings}
        method, own = split_settings(self, self.preconditioner, settings)
        rule = EMASGD()
        super().__init__(
            params,
            model=model,
            rule=rule,
            method=method,
            defaults=dict(lr=lr, momentum=betas[0], weight_decay=weight_decay),
            **own,
        )
        rule.average_only(p for layer in self.curvature.layers for p in layer.parameters)
