"""AFOpt and AdaAFOpt: attention modules preconditioned as a whole."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..preconditioners import AttentionFeature
from .base import PreconditionedOptimizer, split_settings
from .families import PreconditionedSGDM
from .rules import build_rule


class AFOpt(PreconditionedSGDM):
    """SGD with momentum on attention features, and G R^-1 on other layers (thesis Algorithm 7).

    Arguments as in `PreconditionedSGDM`; settings as in `AttentionFeature`.
    """

    preconditioner = AttentionFeature


class AdaAFOpt(PreconditionedOptimizer):
    """AdamW or Adan on attention features, and G R^-1 on other layers (thesis Algorithm 8).

    The moments are those of the direction after norm recovery, where Algorithm 8 prints the one
    before.

    Args:
        params: Parameters or groups, with `model`; or the module itself.
        lr: Learning rate.
        betas: Decays of the moments; default (0.9, 0.999) for AdamW and (0.98, 0.92, 0.99) for
            Adan.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay (proximal with Adan).
        model: The module that owns the parameters.
        rule: 'AdamW' or 'Adan'.
        **settings: Those of `AttentionFeature` (`variant`, `damping`, ...) and
            `PreconditionedOptimizer` (`capture_mb`, `save_curvature`).

    Raises:
        ValueError: For values out of range or a missing model.
        TypeError: For unknown settings.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, ...] | None = None,
                 eps: float = 1e-8, weight_decay: float = 0., *, model: nn.Module | None = None,
                 rule: str = 'AdamW', **settings: Any) -> None:
        method, own = split_settings(self, AttentionFeature, settings)
        given = {} if betas is None else dict(betas=betas)
        built, defaults = build_rule(dict(type=rule, lr=lr, eps=eps, weight_decay=weight_decay,
                                          **given), choices=('AdamW', 'Adan'))
        super().__init__(params, model=model, rule=built, method=method, defaults=defaults, **own)
