"""Sides of an attention layer: sums over the queries of its windows.

The module `attention.layer` defines the symbols. A sum runs over windows and over queries that are
no padding. A running statistic is the mean over all queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..form import Form
from ..moments import Moment
from ..statistic import INPUT, Side, Statistic
from ..vectors import CountedMean
from .heads import Heads

if TYPE_CHECKING:
    from .layer import AttentionLayer


#: Every side by class and name.
_DEFINED: dict[tuple[str, str], AttentionSide] = {}


def _defined(kind: str, name: str) -> AttentionSide:
    return _DEFINED[kind, name]


@dataclass(frozen=True, kw_only=True)
class AttentionSide(Side):
    """One kind of sum over the windows of attention.

    Attributes:
        size: Function of a layer that returns the blocks and length of the side. There is 1 block
            if the heads share the side.
        measure: Function that returns the sum over some windows.
        flops: Function that returns the approximate FLOPs of one window, given the layer and the
            numbers of queries and keys.
        lays_out_rows: Whether `measure` lays out rows (h, n, c) for each head.
    """

    #: The only form of this side's statistics.
    form: ClassVar[type[Form]] = Moment

    size: Callable[[AttentionLayer], tuple[int, int]] = lambda layer: (layer.heads, layer.rows)
    measure: Callable[[Heads], Tensor]
    flops: Callable[[AttentionLayer, int, int], float]
    lays_out_rows: bool = False

    def __post_init__(self) -> None:
        _DEFINED.setdefault((type(self).__qualname__, self.name), self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Known by class and name, as its functions may have none."""
        return _defined, (type(self).__qualname__, self.name)

    def sum_shape(self, layer: AttentionLayer, keys: int) -> tuple[int, ...]:
        """Shape of the sum that `measure` returns; here (b, n, n)."""
        blocks, length = self.size(layer)
        return blocks, length, length

    def finish(self, total: Tensor, windows: int) -> Tensor:
        """Statistic from the sum over a number of windows."""
        return total


@dataclass(frozen=True, kw_only=True)
class MeanSide(AttentionSide):
    """Side with a weighted sum of rows (1, n, 1), whose last entry is the sum of the weights."""

    form: ClassVar[type[Form]] = CountedMean

    def sum_shape(self, layer: AttentionLayer, keys: int) -> tuple[int, ...]:
        """Shape (1, n, 1)."""
        return *self.size(layer), 1


def weighted_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum (1, c + 1, 1) of rows (w, n, c) with a trailing 1, by weights (w, n)."""
    total = torch.einsum('wnc,wn->c', rows, weights)
    return torch.cat([total, weights.sum()[None]])[None, :, None]


def counted_row(layer: AttentionLayer) -> tuple[int, int]:
    """Blocks and length of a mean row with its count."""
    return 1, layer.weight.shape[1] + 1


def _row_moment(rows: Tensor) -> Tensor:
    """Sum (1, c, c) of x'x over windows and tokens (w, n, c)."""
    rows = rows.flatten(0, 1)
    return (rows.t() @ rows)[None]


def _head_moment(rows: Tensor) -> Tensor:
    """Sum (h, c, c) of x'x over windows and tokens (w, h, n, c)."""
    rows = rows.transpose(0, 1).flatten(1, 2)
    return rows.mT @ rows


def _head_curvature(rows: Tensor, gram: Tensor) -> Tensor:
    """Sum (h, d, d) of ``P'T P`` over windows, for P (w, h, n, d)."""
    rows = rows.contiguous()  # once, in place of a copy in each product
    return (rows.mT @ (gram @ rows)).sum(0)


def _gram_flops(layer: AttentionLayer, queries: int, keys: int) -> float:
    """Half the FLOPs of `softmax_gram`, because two statistics share it."""
    return layer.heads * queries * keys * (2 * keys + 3 * layer.rows)


def _curvature_flops(layer: AttentionLayer, queries: int, keys: int) -> float:
    products = keys * keys * layer.rows + keys * layer.rows**2
    return _gram_flops(layer, queries, keys) + 2 * layer.heads * products


def _input_moments(heads: Heads) -> Tensor:
    query = _row_moment(heads.inputs)
    return query if heads.memory is heads.inputs else torch.cat([query, _row_moment(heads.memory)])


def _key_feature_moment(heads: Heads) -> Tensor:
    memory = heads.memory
    weighted = (heads.gram @ memory[:, None]).transpose(0, 1).flatten(1, 2)
    return memory.flatten(0, 1).t() @ weighted


def _value_feature_moment(heads: Heads) -> Tensor:
    return _head_moment((heads.scores @ heads.values_in[:, None]) * heads.keep[:, None, :, None])


def _key_row_sum(heads: Heads) -> Tensor:
    share = heads.inputs.shape[1] / heads.memory.shape[1]
    return weighted_sum(heads.memory, torch.full_like(heads.memory[..., 0], share))


def _attended_row_sum(heads: Heads) -> Tensor:
    attended = (heads.scores * heads.keep[:, None, :, None]).sum(2).mean(1)
    return weighted_sum(heads.values_in, attended)


#: Sum of x'x over the inputs of W_Q, and over those of W_K if they differ.
_INPUT = AttentionSide(
    'input',
    size=lambda layer: (layer.inputs, layer.columns),
    measure=_input_moments,
    flops=lambda layer, queries, keys: (
        2 * layer.inputs * keys * layer.columns**2 + layer.read_flops(queries, keys)
    ),
)
#: Attention's own version of sides that all layers have.
DECLARED: dict[Side, AttentionSide] = {INPUT: _INPUT}

#: Sum of M_i'M_i with M_i = V' J_i K: the exact left factor of W_Q.
QUERY_CURVATURE = Statistic(
    AttentionSide(
        'query_curvature',
        measure=lambda heads: _head_curvature(heads.key, heads.gram),
        flops=_curvature_flops,
    ),
    Moment(),
    key='query_curvature',
)
#: The same sum with Q in place of K.
KEY_CURVATURE = Statistic(
    AttentionSide(
        'key_curvature',
        measure=lambda heads: _head_curvature(heads.query, heads.gram),
        flops=_curvature_flops,
    ),
    Moment(),
    key='key_curvature',
)
#: Sum of o'o over the inputs o of the output projection. In a layer without W_K's curvature, where
#: no other statistic shares T with W_Q's, these FLOPs include the second half of T.
OUTPUT_MOMENT = Statistic(
    AttentionSide(
        'output',
        size=lambda layer: (1, layer.heads * layer.rows),
        measure=lambda heads: _row_moment(heads.outputs * heads.keep[..., None]),
        flops=lambda layer, queries, keys: (
            2 * queries * (layer.heads * layer.rows) ** 2
            + (0 if layer.is_square else _gram_flops(layer, queries, keys))
        ),
    ),
    Moment(),
)
#: Sum of q'q.
QUERY_MOMENT = Statistic(
    AttentionSide(
        'query',
        measure=lambda heads: _head_moment(heads.query * heads.keep[:, None, :, None]),
        flops=lambda layer, queries, keys: 2 * layer.heads * queries * layer.rows**2,
    ),
    Moment(),
)
#: Sum of Y_i'Y_i with Y_i = V' J_i X.
KEY_FEATURE_MOMENT = Statistic(
    AttentionSide(
        'key_feature',
        size=lambda layer: (layer.heads, layer.columns),
        measure=_key_feature_moment,
        flops=lambda layer, queries, keys: (
            _gram_flops(layer, queries, keys)
            + 2 * layer.heads * (keys * keys * layer.columns + keys * layer.columns**2)
        ),
        lays_out_rows=True,
    ),
    Moment(),
)
#: Sum of (s_i X)'(s_i X), the exact features of W_V.
VALUE_FEATURE_MOMENT = Statistic(
    AttentionSide(
        'value_feature',
        size=lambda layer: (layer.heads, layer.columns),
        measure=_value_feature_moment,
        flops=lambda layer, queries, keys: (
            2 * layer.heads * (queries * keys * layer.columns + queries * layer.columns**2)
        ),
        lays_out_rows=True,
    ),
    Moment(),
)

#: Sums of the input rows of W_Q and of W_K, and of the rows s_i X.
QUERY_MEAN = Statistic(
    MeanSide(
        'query',
        size=counted_row,
        measure=lambda heads: weighted_sum(heads.inputs, heads.keep),
        flops=lambda layer, queries, keys: (
            2 * queries * layer.columns + layer.read_flops(queries, keys)
        ),
    ),
    CountedMean(),
)
KEY_MEAN = Statistic(
    MeanSide(
        'key',
        size=counted_row,
        measure=_key_row_sum,
        flops=lambda layer, queries, keys: 2 * keys * layer.columns,
    ),
    CountedMean(),
)
VALUE_MEAN = Statistic(
    MeanSide(
        'value',
        size=counted_row,
        measure=_attended_row_sum,
        flops=lambda layer, queries, keys: 2 * keys * layer.columns,
    ),
    CountedMean(),
)
