"""Rank-one preconditioners: G (I - a a' / (rho + a'a)) with the mean input a."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_flag, check_number
from ..curvature import AttentionLayer, Layer, RunningAverage
from .base import Preconditioner, check_damping, damping_like
from .sides import Stacked

#: 'paper': the method as published. 'official': as its authors' code does what differs.
COMPATS = ('paper', 'official')

#: The projections of an attention module, in the order of its weight's rows.
PROJECTIONS = ('query', 'key', 'value')


@dataclass(frozen=True, kw_only=True)
class ActivationMean(Preconditioner):
    """MAC: ``V = G (I - a a' / (rho + a'a))``, which is rho times ``G (rho I + a a')^-1``.

    a is the bias-corrected running average of the mean input row, its trailing 1 included. V is
    not scaled: what is orthogonal to a passes as it is.

    Of an attention module, W_Q and W_K take the mean rows that they multiply, and W_V the mean of
    the rows s_i X that the softmax makes of them, of real queries alone. (The authors' code
    multiplies the mean of the softmax by the mean of X, which is another thing for each size of a
    batch, and splits Swin's weights wrongly from the second stage on.)

    SMAC, `output=True`: V = Z G (I - ...) with Z = diag(1 / (z + rho)) and z the running average of
    the mean squared gradient rows. It leaves attention modules' outputs, and those of a calibrated
    first layer, alone.

    Source: MAC (arXiv 2506.08464) and its code; SMAC from the code alone.

    State: 2 i numbers a block, 2 (i + o) of SMAC. A refresh costs nothing, a step 4 o i.

    Attributes:
        stat_decay: Weight of the old statistic, in [0, 1).
        damping: rho, absolute.
        output: Whether the output side is taken too (SMAC).
        gradient_scale: Of SMAC's gradient rows: 'rows' multiplies those of the mean loss by their
            number, which makes each the gradient of its own loss; 'none' takes them as they are, as
            the authors' code does: so small that Z is 1 / rho.
        attention: Whether attention modules are read as a whole, rather than as linear layers.
        max_windows: Windows measured of an attention module a call.
        compat: 'official' multiplies the means of softmax and X for W_V, each call by itself, and
            leaves the factor rho out of a calibrated first layer.
    """

    stat_interval: int = 5
    refresh_interval: int = 50
    stat_decay: float = 0.95
    damping: float = 1.
    output: bool = False
    gradient_scale: str = 'rows'
    attention: bool = True
    max_windows: int = 256
    compat: str = 'paper'

    requires: ClassVar[tuple[str, ...]] = ('input_mean',)

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
    def attention_windows(self) -> int:
        """`max_windows`, or 0 where attention modules are nothing special."""
        return self.max_windows if self.attention else 0

    @property
    def attention_bias(self) -> bool:
        """Biases of attention modules belong to the rows."""
        return True

    def wanted(self, layer: Layer) -> tuple[str, ...]:
        """The mean input, of an attention module three, and of SMAC the squared gradient."""
        if isinstance(layer, AttentionLayer):
            value = 'value_product_mean' if self.compat == 'official' else 'value_mean'
            return 'query_mean', 'key_mean', value
        return (*self.requires, 'gradient_square') if self.output else self.requires

    def note(self, layer: Layer) -> str:
        """What an attention module is taken for."""
        if isinstance(layer, AttentionLayer):
            return f'attention, {layer.heads} heads'
        return super().note(layer)

    def gradient_factor(self, rows: float) -> float:
        """Of the mean over rows: rows^2 / rows, or 1 / rows."""
        return rows if self.gradient_scale == 'rows' else 1 / rows

    def average(self) -> RunningAverage:
        """Moving average with bias correction."""
        return RunningAverage(self.stat_decay, corrected=True)

    def operator_shapes(self, layer: Layer) -> dict[str, tuple[int, int, int]]:
        """Shapes (b, n, 1) of a layer's vectors."""
        shapes = {_vector_name(name): layer.statistic_shape(name) for name in self.required(layer)}
        if isinstance(layer, AttentionLayer):
            return {name: (1, layer.columns, 1) for name in shapes}
        return shapes

    def apply_flops(self, layer: Layer) -> float:
        """Operations of one step (see the base class)."""
        return 4. * math.prod(layer.shape) + self.output * math.prod(layer.shape)

    def refresh(self, statistics: Stacked, previous: Stacked | None,
                damping: Tensor | float | None = None) -> tuple[Stacked, Tensor]:
        """``u = a / sqrt(rho + a'a)``, with which V = G (I - u u'), and Z (see the base class)."""
        operator: Stacked = {}
        for name, vector in statistics.items():
            rho = damping_like(self.damping if damping is None else damping, vector)
            if name.startswith('gradient'):
                operator[_vector_name(name)] = 1 / (vector + rho)
            else:
                size = vector.square().sum(-2, keepdim=True)
                operator[_vector_name(name)] = vector * (rho + size).rsqrt()
        fine = [vector.isfinite().flatten(1).all(1) for vector in operator.values()]
        return operator, torch.stack(fine).all(0)

    def apply(self, operator: Stacked, gradients: Tensor) -> Tensor:
        """``Z G (I - u u')``, of an attention module for each projection."""
        if 'query' in operator:
            parts = gradients.chunk(3, dim=1)
            return torch.cat([_without(part, operator[name]) for name, part
                              in zip(PROJECTIONS, parts, strict=True)], 1)
        directions = _without(gradients, operator['input'])
        return operator['gradient'] * directions if 'gradient' in operator else directions


def _vector_name(statistic: str) -> str:
    """The name of the operator that a statistic makes: its first word."""
    return statistic.split('_')[0]


def _without(gradients: Tensor, vector: Tensor) -> Tensor:
    """``G (I - u u')`` for G (k, b, o, i) and u (k, b, i, 1)."""
    return gradients - (gradients @ vector) @ vector.mT
