"""Base classes of most optimizers: a rule with one preconditioner."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..preconditioners import Preconditioner
from ..rules import ADAPTIVE, EMASGD, SGDM, build_rule
from .base import PreconditionedOptimizer
from .settings import split_settings


class PreconditionedSGDM(PreconditionedOptimizer):
    """SGD with momentum on the directions of one preconditioner.

    Args:
        params: Parameters or groups, with `model`; or the module itself.
        lr: Learning rate.
        momentum: Heavy-ball momentum.
        weight_decay: L2 decay, added after preconditioning.
        model: The module that owns the parameters.
        **settings: Settings of the preconditioner (`damping`, `stat_interval`, `refresh_interval`,
            ...) and of `PreconditionedOptimizer` (`clip_update`, `sharding`, ...).
            ``settings='published'`` starts from the literal settings of the source.

    Attributes:
        preconditioner: The preconditioner's class.
        rule_type: The rule's class.

    Raises:
        ValueError: If a value is out of range or the model is missing.
        TypeError: If a setting is unknown.
    """

    preconditioner: ClassVar[type[Preconditioner]]
    rule_type: ClassVar[type[SGDM] | type[EMASGD]] = SGDM

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        model: nn.Module | None = None,
        **settings: Any,
    ) -> None:
        method, options = split_settings(self, self.preconditioner, settings)
        super().__init__(
            params,
            model=model,
            rule=self.rule_type(),
            method=method,
            defaults=dict(lr=lr, momentum=momentum, weight_decay=weight_decay),
            **options,
        )


class PreconditionedAdam(PreconditionedOptimizer):
    """AdamW or another adaptive rule on the directions of one preconditioner.

    Args:
        params: Parameters or groups, with `model`; or the module itself.
        lr: Learning rate.
        betas: Decays of the moments; default: (0.98, 0.92, 0.99) for Adan, (0.9, 0.999) for others.
            AdaGrad has none.
        eps: Added to the root of the second moment; default: 1e-16 for AdaBelief, 1e-10 for
            AdaGrad, 1e-8 for others.
        weight_decay: Weight decay outside the moments: proximal with Adan, decoupled with others
            (but see `decay`).
        model: The module that owns the parameters.
        rule: 'AdamW', 'Adan', 'AdaGrad', 'RAdam' or 'AdaBelief' (see `rules`).
        **settings: Settings of the preconditioner (`damping`, `stat_interval`, `refresh_interval`,
            ...) and of `PreconditionedOptimizer` (`clip_update`, `sharding`, ...).
            ``settings='published'`` starts from the literal settings of the source.

    Attributes:
        preconditioner: The preconditioner's class.
        decay: Form of AdamW's weight decay (see `rules.AdamW`).

    Raises:
        ValueError: If a value is out of range or the model is missing.
        TypeError: If a setting is unknown.
    """

    preconditioner: ClassVar[type[Preconditioner]]
    decay: ClassVar[str] = 'decoupled'

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, ...] | None = None,
        eps: float | None = None,
        weight_decay: float = 0.0,
        *,
        model: nn.Module | None = None,
        rule: str = 'AdamW',
        **settings: Any,
    ) -> None:
        method, options = split_settings(self, self.preconditioner, settings)
        config: dict[str, Any] = dict(type=rule, lr=lr, weight_decay=weight_decay)
        config |= {k: v for k, v in (('betas', betas), ('eps', eps)) if v is not None}
        if rule == 'AdamW':
            config['decay'] = self.decay
        built, defaults = build_rule(config, choices=ADAPTIVE)
        super().__init__(
            params, model=model, rule=built, method=method, defaults=defaults, **options
        )
