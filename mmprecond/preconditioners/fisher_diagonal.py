"""AdaFisher: a diagonal of Kronecker factors divides what the rule makes of a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, check_number
from ..curvature import Layer, RunningAverage
from .base import Preconditioner, check_damping, damping_like
from .sides import Stacked

EMAS = ('paper', 'code')


@dataclass(frozen=True, kw_only=True)
class FisherDiagonal(Preconditioner):
    """AdaFisher: the rule's direction D becomes ``D / (s h' + lambda)``, entry by entry.

    h and s are running averages, from ones, of the diagonals of R and L, each capture shifted and
    scaled to reach from 0 to 1 over its layer.

    Source: AdaFisher (arXiv 2405.16397) and its code. The averages' weights are an option: those of
    the code sum to 0.088, so that s h' is soon nothing beside lambda, and the method momentum SGD
    with the rate lr / lambda. The code's 1e-6 in the divisor of the range, which makes s depend on
    the loss's scale, is left away.

    State: 2 (i + o) numbers a block. A step costs o i.

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

    requires: ClassVar[tuple[str, ...]] = ('input_square', 'gradient_square')
    rules: ClassVar[tuple[str, ...]] = ('EMASGD',)
    restores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number('stat_decay', self.stat_decay, high=1)
        check_damping('damping', self.damping)
        check_choice('ema', self.ema, EMAS)

    def average(self) -> RunningAverage:
        """Moving average from ones, of samples that reach from 0 to 1."""
        old, new = {'paper': (self.stat_decay, 1 - self.stat_decay),
                    'code': (0.1 * self.stat_decay, 0.01 * self.stat_decay)}[self.ema]
        return RunningAverage(old, new_weight=new, start=1., normalise='range')

    def operator_shapes(self, layer: Layer) -> dict[str, tuple[int, int, int]]:
        """Shapes (b, n, m) of a layer's operators by name."""
        blocks, rows, columns = layer.shape
        return {'gradient': (blocks, rows, 1), 'input': (blocks, 1, columns),
                'damping': (1, 1, 1)}

    def apply_flops(self, layer: Layer) -> float:
        """Operations of one step (see the base class)."""
        return 3. * math.prod(layer.shape)

    def refresh(self, statistics: Stacked, previous: Stacked | None,
                damping: Tensor | float | None = None) -> tuple[Stacked, Tensor]:
        """The two vectors and lambda (see the base class)."""
        left, right = statistics['gradient_square'], statistics['input_square'].mT
        amount = damping_like(self.damping if damping is None else damping, left)
        fine = left.isfinite().flatten(1).all(1) & right.isfinite().flatten(1).all(1)
        return {'gradient': left.clone(), 'input': right.clone(),
                'damping': amount.expand(len(left), 1, 1, 1).clone()}, fine

    def apply(self, operator: Stacked, gradients: Tensor) -> Tensor:
        """The gradients as they are: the rule averages them first."""
        return gradients

    def restore(self, operator: Stacked, directions: Tensor) -> Tensor:
        """``D / (s h' + lambda)``."""
        return directions / torch.addcmul(operator['damping'], operator['gradient'],
                                          operator['input'])
