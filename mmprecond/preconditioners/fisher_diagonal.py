"""AdaFisher: division of the rule's update by a diagonal of Kronecker factors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, check_number
from ..curvature import GRADIENT, INPUT, Layer, RunningAverage, Square, Statistic
from ..linalg import Diagonal, Operators
from .base import WHOLE_LAYERS, Factors, Preconditioner, check_damping, damping_like
from .registry import register_preconditioner

EMAS = ('paper', 'code')


@register_preconditioner
@dataclass(frozen=True, kw_only=True)
class FisherDiagonal(Preconditioner):
    """AdaFisher: the rule's update D becomes ``D / (s h' + lambda)``, entry by entry.

    h and s are running averages of the diagonals of R and L. Both averages start from ones. Each
    capture is shifted and scaled to the range from 0 to 1 over its layer.

    Source: AdaFisher (arXiv 2405.16397) and its code. The weights of the averages are an option.
    Those of the code sum to 0.088: s h' is soon negligible beside lambda, and the method becomes
    momentum SGD with the learning rate lr / lambda. The code adds 1e-6 to the divisor of the range,
    which makes s depend on the scale of the loss; this implementation does not.

    State: 2 (i + o) numbers per block. A step costs 3 o i FLOPs.

    Attributes:
        stat_decay: gamma.
        damping: lambda.
        ema: 'paper': gamma old + (1 - gamma) new; 'code': 0.1 gamma old + 0.01 gamma new.
    """

    stat_interval: int = 100
    refresh_interval: int = 100
    stat_decay: float = 0.8
    damping: float = 1e-3
    ema: str = 'paper'

    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic(INPUT, Square()),
        Statistic(GRADIENT, Square()),
    )
    rules: ClassVar[tuple[str, ...]] = ('EMASGD',)
    acts_after_rule: ClassVar[bool] = True

    word: ClassVar[str] = 'AdaFisher'
    #: The authors' code.
    published: ClassVar[dict[str, Any]] = dict(
        stat_interval=100,
        refresh_interval=100,
        stat_decay=0.8,
        damping=1e-3,
        ema='code',
        **WHOLE_LAYERS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number('stat_decay', self.stat_decay, high=1)
        check_damping('damping', self.damping)
        check_choice('ema', self.ema, EMAS)

    def average(self) -> RunningAverage:
        """Moving average of samples with the range from 0 to 1, started from ones."""
        old, new = {
            'paper': (self.stat_decay, 1 - self.stat_decay),
            'code': (0.1 * self.stat_decay, 0.01 * self.stat_decay),
        }[self.ema]
        return RunningAverage(old, new_weight=new, start=1.0, normalise='range')

    def outline(self, layer: Layer) -> Operators:
        """s, h' and lambda."""
        blocks, rows, columns = layer.shape
        return {
            GRADIENT.name: Diagonal.outline((blocks, rows, 1)),
            INPUT.name: Diagonal.outline((blocks, 1, columns)),
            'damping': Diagonal.outline((1, 1, 1)),
        }

    def apply_flops(self, layer: Layer) -> float:
        """Operations of one step (see the base class)."""
        return 3.0 * math.prod(layer.shape)

    def refresh(
        self, factors: Factors, previous: Operators | None, damping: Tensor | float | None = None
    ) -> tuple[Operators, Tensor]:
        """The two vectors and lambda (see the base class)."""
        left, right = factors[GRADIENT].tensor, factors[INPUT].tensor.mT
        amount = damping_like(self.damping if damping is None else damping, left)
        finite = left.isfinite().flatten(1).all(1) & right.isfinite().flatten(1).all(1)
        return {
            GRADIENT.name: Diagonal(left.clone()),
            INPUT.name: Diagonal(right.clone()),
            'damping': Diagonal(amount.expand(len(left), 1, 1, 1).clone()),
        }, finite

    def apply(self, operators: Operators, gradients: Tensor) -> Tensor:
        """Returns the gradients unchanged; the rule averages them first."""
        return gradients

    def restore(self, operators: Operators, updates: Tensor) -> Tensor:
        """``D / (s h' + lambda)``."""
        (damping,), (left,), (right,) = (
            operators[slot].tensors for slot in ('damping', GRADIENT.name, INPUT.name)
        )
        return updates / torch.addcmul(damping, left, right)
