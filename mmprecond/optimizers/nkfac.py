"""NKFAC and AdaNKFAC: Kronecker-factored curvature with Newton-iteration inverses."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..preconditioners import NewtonKronecker
from .base import PreconditionedOptimizer, split_settings
from .rules import SGDM, AdamW


class NKFAC(PreconditionedOptimizer):
    """SGD with momentum on L^-1 G R^-1 (thesis chapter 3, Algorithm 4).

    Args:
        params: Parameters or groups, with `model`; or the module itself.
        lr: Learning rate.
        momentum: Heavy-ball momentum.
        weight_decay: L2 decay, added after preconditioning.
        model: The module that owns the parameters.
        **settings: Those of `NewtonKronecker` (`damping`, `stat_interval`, `refresh_interval`,
            `solver`, ...) and `PreconditionedOptimizer` (`capture_mb`, `save_curvature`).

    Raises:
        ValueError: For values out of range or a missing model.
        TypeError: For unknown settings.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, weight_decay: float = 0., *,
                 model: nn.Module | None = None, **settings: Any) -> None:
        method, own = split_settings(self, NewtonKronecker, settings)
        super().__init__(params, model=model, rule=SGDM(), method=method,
                         defaults=dict(lr=lr, momentum=momentum, weight_decay=weight_decay), **own)


class AdaNKFAC(PreconditionedOptimizer):
    """AdamW on L^-1 G R^-1 (thesis Algorithm 5), by default at intervals 100 and 1000.

    Weight decay is lr / (1 - beta1^t) weight_decay p, as in the published code.

    Args:
        params: Parameters or groups, with `model`; or the module itself.
        lr: Learning rate.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decay, see above.
        model: The module that owns the parameters.
        **settings: As for `NKFAC`.

    Raises:
        ValueError: For values out of range or a missing model.
        TypeError: For unknown settings.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0., *,
                 model: nn.Module | None = None, **settings: Any) -> None:
        method, own = split_settings(self, NewtonKronecker, settings,
                                     stat_interval=100, refresh_interval=1000)
        super().__init__(params, model=model, rule=AdamW(decay='published'), method=method,
                         defaults=dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay),
                         **own)
