"""AdaAct: division of the rule's update by the root of the inputs' mean square."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_number
from ..curvature import INPUT, Layer, RunningAverage, Square, Statistic
from ..linalg import Diagonal, Operators
from .base import WHOLE_LAYERS, Factors, Preconditioner
from .registry import register_preconditioner


@register_preconditioner
@dataclass(frozen=True, kw_only=True)
class InputDiagonal(Preconditioner):
    """AdaAct: the rule's update D becomes ``D diag(1 / (sqrt(v) + eps))``.

    v is the bias-corrected running average of the mean squared input rows: the diagonal of R,
    including the trailing 1 of a bias. The least value of v is `FLOOR` times the layer's mean
    square, for inputs that are (nearly) always zero.

    Source: AdaAct (arXiv 2506.08353) and its code, which updates v at every step. The floor is
    this project's.

    State: 2 i numbers per block. A capture reads the inputs once, a step costs o i FLOPs.

    Attributes:
        stat_decay: Weight of the old statistic, in [0, 1).
        eps: Added to the root.
    """

    stat_interval: int = 1
    refresh_interval: int = 1
    stat_decay: float = 0.999
    eps: float = 1e-8

    statistics: ClassVar[tuple[Statistic, ...]] = (Statistic(INPUT, Square()),)
    rules: ClassVar[tuple[str, ...]] = ('EMASGD',)
    acts_after_rule: ClassVar[bool] = True

    #: Least entry of v, relative to the mean.
    FLOOR: ClassVar[float] = 1e-12

    word: ClassVar[str] = 'AdaAct'
    #: The authors' code.
    published: ClassVar[dict[str, Any]] = dict(
        stat_interval=1, refresh_interval=1, stat_decay=0.999, eps=1e-8, **WHOLE_LAYERS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number('stat_decay', self.stat_decay, high=1)
        check_number('eps', self.eps)

    def average(self) -> RunningAverage:
        """Moving average with bias correction."""
        return RunningAverage(self.stat_decay, corrected=True)

    def outline(self, layer: Layer) -> Operators:
        """Row of reciprocal roots, one for each input."""
        blocks, _, columns = layer.shape
        return {INPUT.name: Diagonal.outline((blocks, 1, columns))}

    def apply_flops(self, layer: Layer) -> float:
        """Operations of one step (see the base class)."""
        return float(math.prod(layer.shape))

    def refresh(
        self, factors: Factors, previous: Operators | None, damping: Tensor | float | None = None
    ) -> tuple[Operators, Tensor]:
        """Computes the reciprocal roots; `damping` has no effect (see the base class)."""
        square = factors[INPUT].tensor.mT
        least = self.FLOOR * square.mean((-3, -1), keepdim=True)
        factor = 1 / (torch.maximum(square, least).sqrt() + self.eps)
        return {INPUT.name: Diagonal(factor)}, factor.isfinite().flatten(1).all(1)

    def apply(self, operators: Operators, gradients: Tensor) -> Tensor:
        """Returns the gradients unchanged; the rule averages them first."""
        return gradients

    def restore(self, operators: Operators, updates: Tensor) -> Tensor:
        """``D diag(1 / (sqrt(v) + eps))``."""
        return operators[INPUT.name].right(updates)
