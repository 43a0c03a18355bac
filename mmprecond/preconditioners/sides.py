"""The two sides of a layer's matrix form, and the forms in which their operators come.

A side's statistic is its moment, or what stands for it: diagonal blocks, or columns A of which A A'
is the moment (kept rows, or eigenvectors from a sketch). Its operator is accordingly

* ``input_moment`` (b, n, n): a matrix,
* ``input_blocks`` (count, m, m): its diagonal blocks, where b is 1,
* ``input_columns`` U (b, n, r) and ``input_scale`` (b, 1, 1): scale (I - U U'),

and likewise for ``gradient_...``. Statistics over other rows (`REDUCED`, `SAMPLED`) make the same
operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..curvature import BLOCKS, COLUMNS, MOMENT, REDUCED, SAMPLED, SKETCH, Layer
from ..linalg import (
    apply_columns,
    columns_to_matrix,
    largest_eigenvalue,
    largest_eigenvalue_of_columns,
    low_rank_power,
    power_of_columns,
    stacked_product,
)

#: Stacked tensors by name: (layers, blocks, n, m).
Stacked = dict[str, Tensor]

SCALE = '_scale'
SIDES = ('gradient', 'input')


@dataclass(frozen=True)
class LowRank:
    """When a dense moment's power is kept as columns.

    Attributes:
        tolerance: Relative error allowed in any direction.
        max_rank: Most columns kept, whatever the tolerance; None for half the side's length, and
            a dense operator where that is not enough.
    """

    tolerance: float = 0.1
    max_rank: int | None = None

    #: Sides shorter than this stay dense.
    smallest_side = 256
    #: Guess of the rank, as a share of n, for the forecast of memory.
    usual_share = 1 / 8

    def takes(self, name: str, side: int) -> bool:
        """Whether a side's power may come as columns."""
        return MOMENT in name and side >= self.smallest_side

    def usual(self, side: int) -> int:
        """A guess of the rank."""
        return min(int(side * self.usual_share), self.max_rank or side)


def side_name(statistic: str) -> str:
    """The name of the operator that a statistic makes."""
    return statistic.removesuffix(REDUCED).removesuffix(SAMPLED).replace(SKETCH, COLUMNS)


def operator_shapes(layer: Layer, statistics: tuple[str, ...],
                    low_rank: LowRank | None = None) -> dict[str, tuple[int, int, int]]:
    """Shapes (b, n, m) of the operators that some statistics of a layer make.

    With `low_rank` those that are likely: m, or the form, is found at a refresh.
    """
    shapes = {}
    for statistic in statistics:
        name, shape = side_name(statistic), layer.statistic_shape(statistic)
        if low_rank is not None and low_rank.takes(name, shape[-1]):
            name = name.replace(MOMENT, COLUMNS)
            shape = (shape[0], shape[1], low_rank.usual(shape[1]))
        shapes[name] = shape
        if COLUMNS in name:
            shapes[name.replace(COLUMNS, SCALE)] = (layer.blocks, 1, 1)
    return shapes


def largest(name: str, statistic: Tensor) -> Tensor:
    """Estimate of the largest eigenvalue of a side's moment in any form (..., b).

    Blocks of one side are damped alike: all have that of the largest.
    """
    if COLUMNS in name:
        return largest_eigenvalue_of_columns(statistic)
    values = largest_eigenvalue(statistic)
    return values.amax(-1, keepdim=True).expand_as(values) if BLOCKS in name else values


def trace(name: str, statistic: Tensor) -> Tensor:
    """Trace of a side's moment, given by itself or by columns."""
    return (statistic.square().sum((-2, -1)) if COLUMNS in name
            else statistic.diagonal(dim1=-2, dim2=-1).sum(-1))


def damped_sides(statistics: Stacked, amounts: Callable[[str, Tensor], Tensor],
                 solve: Callable[[str, Tensor], tuple[Tensor, Tensor]],
                 exponent: float = 1., low_rank: LowRank | None = None,
                 previous: Stacked | None = None) -> tuple[Stacked, Tensor]:
    """Negative powers of all sides' damped moments.

    Args:
        statistics: Moments, blocks or columns (k, b, n, m) by name.
        amounts: Of a side's name and moment or columns, what is added to its diagonal (k, b).
        solve: Of a side's name and damped matrices, their power and whether it succeeded (k, b).
        exponent: The power that `solve` takes, for columns.
        low_rank: When dense moments are turned into columns.
        previous: The last operators: a side that is dense there stays so, and columns are where
            the search for new ones starts.

    Returns:
        Operators by name, and a bool tensor (k,) that is False where one failed.
    """
    operator: Stacked = {}
    outcomes = []
    for statistic, given in statistics.items():
        name = side_name(statistic)
        found: tuple[Tensor, Tensor, Tensor] | None = None
        if COLUMNS in name:
            found = power_of_columns(given, amounts(name, given), exponent)
        elif low_rank is not None and low_rank.takes(name, given.shape[-1]) and name not in (
                previous or ()):
            name = name.replace(MOMENT, COLUMNS)
            found = low_rank_power(given, (previous or {}).get(name), partial(amounts, name),
                                   exponent, low_rank.tolerance, low_rank.max_rank)
        if found is not None:
            operator[name], operator[name.replace(COLUMNS, SCALE)], good = found
        else:
            name = side_name(statistic)
            operator[name], good = solve(name, add_damping(given, amounts(name, given)))
        outcomes.append(good.all(-1))
    return operator, torch.stack(outcomes).all(0)


def alike(first: Stacked, second: Stacked) -> tuple[Stacked, Stacked]:
    """The same operators in forms that can be stacked: as many columns, or dense in both."""
    first, second = dict(first), dict(second)
    for side in SIDES if first and second else ():
        if side + MOMENT in first or side + MOMENT in second:
            first, second = _dense(first, side), _dense(second, side)
        elif side + COLUMNS in first:
            name = side + COLUMNS
            width = max(first[name].shape[-1], second[name].shape[-1])
            for operator in (first, second):
                missing = width - operator[name].shape[-1]
                operator[name] = torch.nn.functional.pad(operator[name], (0, missing))
    return first, second


def _dense(operator: Stacked, side: str) -> Stacked:
    if side + COLUMNS not in operator:
        return operator
    columns, scale = operator[side + COLUMNS], operator[side + SCALE]
    rest = {n: o for n, o in operator.items() if n not in (side + COLUMNS, side + SCALE)}
    return {**rest, side + MOMENT: columns_to_matrix(columns, scale)}


def adapted(shapes: dict[str, tuple[int, int, int]],
            tensors: Stacked) -> dict[str, tuple[int, int, int]]:
    """Likely operator shapes of a layer, made those of its operators where they may differ."""
    result = dict(shapes)
    for side in SIDES:
        name = side + COLUMNS
        if name not in shapes:
            continue
        blocks, size, _ = shapes[name]
        if side + MOMENT in tensors:
            del result[name], result[side + SCALE]
            result[side + MOMENT] = (blocks, size, size)
        elif name in tensors and tensors[name].dim() == 3:
            result[name] = (blocks, size, min(tensors[name].shape[-1], size))
    return result


def two_sided(operator: Stacked, gradients: Tensor) -> Tensor:
    """``L G R`` for gradients (k, b, o, i); a side without an operator is left alone."""
    directions = gradients
    for side in SIDES:
        if side + MOMENT in operator:
            matrix = operator[side + MOMENT]
            directions = (stacked_product(matrix, directions) if side == 'gradient'
                          else stacked_product(directions, matrix))
        elif side + COLUMNS in operator or side + BLOCKS in operator:
            turned = directions.mT if side == 'gradient' else directions
            turned = _from_the_right(operator, side, turned)
            directions = turned.mT if side == 'gradient' else turned
    return directions


def _from_the_right(operator: Stacked, side: str, matrices: Tensor) -> Tensor:
    """Matrices (k, b, o, n) times a symmetric operator (k, b, n, n) in one of its other forms."""
    if side + COLUMNS in operator:
        return apply_columns(matrices, operator[side + COLUMNS], operator[side + SCALE])
    blocks = operator[side + BLOCKS]
    k, b, o, n = matrices.shape
    size = blocks.shape[-1]
    count = blocks.shape[1] // b
    padded = torch.nn.functional.pad(matrices, (0, count * size - n))
    pieces = padded.reshape(k, b, o, count, size).transpose(2, 3)
    products = pieces @ blocks.reshape(k, b, count, size, size)
    return products.transpose(2, 3).reshape(k, b, o, count * size)[..., :n]


def add_damping(statistic: Tensor, damping: Tensor) -> Tensor:
    """``A + mu I`` for matrices (..., n, n) and dampings mu (...)."""
    damped = statistic.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping[..., None])
    return damped


def relative_damping(statistic: Tensor, damping: Tensor | float, name: str = MOMENT) -> Tensor:
    """``damping lambda_max`` of each moment (..., b, n, n), or columns by the name: (..., b).

    A block that is nothing beside its layer's others (a saturated head, a dead channel) is damped
    as rounding asks, and a layer that is nothing at all by 1.
    """
    value = largest(name, statistic)
    rounding = 10 * torch.finfo(statistic.dtype).eps
    peak = value.amax(-1, keepdim=True) if value.dim() else value
    amount = damping * value + rounding * peak
    return torch.where(amount > 0, amount, 1)


def exact_relative_damping(name: str, statistic: Tensor, damping: Tensor | float) -> Tensor:
    """The same, but a block takes its layer's largest eigenvalue only where its own is zero."""
    value = largest(name, statistic)
    amount = damping * torch.where(value > 0, value, value.amax(-1, keepdim=True))
    return torch.where(amount > 0, amount, 1)


def recover_norm(directions: Tensor, gradients: Tensor) -> Tensor:
    """Scales each layer's direction (k, b, o, i) to its gradient's Frobenius norm (thesis (3.7)).

    One scalar a layer, over all its blocks, weight and joint bias together. In place, unless the
    two are the same.
    """
    wanted = torch.linalg.vector_norm(gradients, dim=(1, 2, 3), keepdim=True)
    size = torch.linalg.vector_norm(directions, dim=(1, 2, 3), keepdim=True)
    if directions is gradients:
        return directions * (wanted / (size + 1e-12))
    return directions.mul_(wanted / (size + 1e-12))
