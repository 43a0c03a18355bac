"""Rank-one preconditioners: G (I - a a' / (rho + a'a)) with the mean input a."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_flag, check_number
from ..curvature import (
    GRADIENT,
    INPUT,
    AttentionLayer,
    AttentionReading,
    CountedMean,
    Layer,
    Mean,
    RunningAverage,
    Square,
    Statistic,
)
from ..curvature.attention import (
    KEY_MEAN,
    QUERY_MEAN,
    VALUE_MEAN,
    Heads,
    MeanSide,
    counted_row,
    weighted_sum,
)
from ..linalg import Diagonal, Operators, RankOne
from .base import WHOLE_LAYERS, Factors, Preconditioner, check_damping, damping_like
from .registry import register_preconditioner

#: 'paper': the method of the paper. 'official': the authors' code where it differs.
COMPATS = ('paper', 'official')


@dataclass(frozen=True, kw_only=True)
class ProductMeanSide(MeanSide):
    """W_V's mean row in MAC's code: the mean softmax times the mean rows, over all queries.

    The sum holds the rows of each key and the softmax weight of that key (n_k, c + 1).
    """

    def sum_shape(self, layer: AttentionLayer, keys: int) -> tuple[int, ...]:
        return keys, layer.weight.shape[1] + 1

    def finish(self, total: Tensor, windows: int) -> Tensor:
        means = total[:, :-1] / max(1, windows)
        return weighted_sum(means[None], total[None, :, -1])


def _rows_and_scores(heads: Heads) -> Tensor:
    attended = heads.scores.sum((0, 2)).mean(0)
    return torch.cat([heads.values_in.sum(0), attended[:, None]], 1)


VALUE_PRODUCT_MEAN = Statistic(
    ProductMeanSide(
        VALUE_MEAN.side.name,
        size=counted_row,
        measure=_rows_and_scores,
        flops=lambda layer, queries, keys: keys * layer.columns,
    ),
    CountedMean(),
    key='value_product_mean',
)


@register_preconditioner
@dataclass(frozen=True, kw_only=True)
class ActivationMean(Preconditioner):
    """MAC: ``V = G (I - a a' / (rho + a'a))``, which is rho times ``G (rho I + a a')^-1``.

    a is the bias-corrected running average of the mean input row, its trailing 1 included. V is
    not scaled: the part of G orthogonal to a stays as it is.

    In an attention module W_Q and W_K take their mean input rows. W_V takes the mean of the rows
    s_i X that the softmax mixes, without padded queries. (The authors' code multiplies the mean of
    the softmax by the mean of X, which depends on the batch size. It also splits Swin's weights
    wrongly from the second stage on.)

    SMAC is `output=True`: V = Z G (I - ...) with Z = diag(1 / (z + rho)), where z is the running
    average of the mean squared gradient rows. SMAC does not scale the output side of attention
    modules and of a calibrated first layer.

    Source: MAC (arXiv 2506.08464) and its code; SMAC from the code alone.

    State: 2 i numbers per block, 2 (i + o) for SMAC. A refresh costs nothing, a step costs 4 o i
    FLOPs.

    Attributes:
        stat_decay: Weight of the old statistic, in [0, 1).
        damping: rho, absolute.
        output: Whether to precondition the output side too (SMAC).
        gradient_scale: Scale of SMAC's gradient rows. 'rows' multiplies the rows of the mean loss
            by their number, so that each is the gradient of its own loss. 'none' does not scale
            them, as in the authors' code; they are then so small that Z is 1 / rho.
        attention: Whether attention modules are read as a whole instead of as linear layers.
        max_windows: Most windows measured in one call of an attention module.
        compat: 'paper', or 'official' for the authors' code. 'official' multiplies the means of
            softmax and X for W_V in each call, and omits the factor rho in a calibrated first
            layer.
    """

    stat_interval: int = 5
    refresh_interval: int = 50
    stat_decay: float = 0.95
    damping: float = 1.0
    output: bool = False
    gradient_scale: str = 'rows'
    attention: bool = True
    max_windows: int = 256
    compat: str = 'paper'

    statistics: ClassVar[tuple[Statistic, ...]] = (Statistic(INPUT, Mean()),)

    word: ClassVar[str] = 'MAC'
    variants: ClassVar[dict[str, dict[str, Any]]] = dict(SMAC=dict(output=True))
    #: The authors' code.
    published: ClassVar[dict[str, Any]] = dict(
        stat_interval=5,
        refresh_interval=50,
        stat_decay=0.95,
        damping=1.0,
        output=False,
        gradient_scale='none',
        attention=True,
        max_windows=256,
        compat='official',
        **WHOLE_LAYERS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number('stat_decay', self.stat_decay, high=1)
        check_damping('damping', self.damping)
        check_flag('output', self.output)
        check_choice('gradient_scale', self.gradient_scale, ('rows', 'none'))
        check_flag('attention', self.attention)
        check_count('max_windows', self.max_windows)
        check_choice('compat', self.compat, COMPATS)

    @property
    def attention_reading(self) -> AttentionReading | None:
        """Reading of attention modules with their joint biases, if `attention` is set."""
        return AttentionReading(self.max_windows, bias=True) if self.attention else None

    def candidate_statistics(self, layer: Layer) -> tuple[Statistic, ...]:
        """Mean input (three of an attention module), and for SMAC the squared gradient."""
        if layer.has_side(QUERY_MEAN.side):
            value = VALUE_PRODUCT_MEAN if self.compat == 'official' else VALUE_MEAN
            return QUERY_MEAN, KEY_MEAN, value
        if self.output:
            return *self.statistics, Statistic(GRADIENT, Square())
        return self.statistics

    def note(self, layer: Layer) -> str:
        """Number of heads of an attention module."""
        if layer.has_side(QUERY_MEAN.side):
            return f'attention, {layer.blocks // 3} heads'
        return super().note(layer)

    def gradient_factor(self, rows: float) -> float:
        """Factor of the sum over rows: rows^2 / rows, or 1 / rows."""
        return rows if self.gradient_scale == 'rows' else 1 / rows

    def average(self) -> RunningAverage:
        """Moving average with bias correction."""
        return RunningAverage(self.stat_decay, corrected=True)

    def outline(self, layer: Layer) -> Operators:
        """Vector u for each mean, and Z."""
        blocks, rows, columns = layer.shape
        operators: Operators = {}
        for statistic in self.selected_statistics(layer):
            side = statistic.side
            if side.of_gradient:
                operators[side.name] = Diagonal.outline((blocks, rows, 1))
            else:
                count = 1 if isinstance(statistic.form, CountedMean) else blocks
                operators[side.name] = RankOne.outline((count, columns, 1))
        return operators

    def apply_flops(self, layer: Layer) -> float:
        """Operations of one step (see the base class)."""
        scaled = math.prod(layer.shape) if GRADIENT.name in self.outline(layer) else 0
        return super().apply_flops(layer) + scaled

    def refresh(
        self, factors: Factors, previous: Operators | None, damping: Tensor | float | None = None
    ) -> tuple[Operators, Tensor]:
        """``u = a / sqrt(rho + a'a)``, with which V = G (I - u u'), and Z (see the base class)."""
        operators: Operators = {}
        finite = []
        for side, factor in factors.items():
            rho = damping_like(self.damping if damping is None else damping, factor.tensor)
            if side.of_gradient:
                vector = 1 / (factor.tensor + rho)
                operators[side.name] = Diagonal(vector)
            else:
                size = factor.tensor.square().sum(-2, keepdim=True)
                vector = factor.tensor * (rho + size).rsqrt()
                operators[side.name] = RankOne(vector)
            finite.append(vector.isfinite().flatten(1).all(1))
        return operators, torch.stack(finite).all(0)

    def apply(self, operators: Operators, gradients: Tensor) -> Tensor:
        """``Z G (I - u u')``, with one u for each projection of an attention module."""
        projections = [statistic.side.name for statistic in (QUERY_MEAN, KEY_MEAN, VALUE_MEAN)]
        if projections[0] in operators:
            parts = gradients.chunk(3, dim=1)
            return torch.cat(
                [
                    operators[slot].right(part)
                    for slot, part in zip(projections, parts, strict=True)
                ],
                1,
            )
        directions = operators[INPUT.name].right(gradients)
        if GRADIENT.name in operators:
            directions = operators[GRADIENT.name].left(directions)
        return directions
