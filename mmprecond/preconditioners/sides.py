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

import torch
from torch import Tensor

from ..curvature import BLOCKS, COLUMNS, MOMENT, REDUCED, SAMPLED, SKETCH, Layer
from ..linalg import (
    apply_columns,
    largest_eigenvalue,
    largest_eigenvalue_of_columns,
    power_of_columns,
)

#: Stacked tensors by name: (layers, blocks, n, m).
Stacked = dict[str, Tensor]

SCALE = '_scale'
SIDES = ('gradient', 'input')


def side_name(statistic: str) -> str:
    """The name of the operator that a statistic makes."""
    return statistic.removesuffix(REDUCED).removesuffix(SAMPLED).replace(SKETCH, COLUMNS)


def operator_shapes(layer: Layer, statistics: tuple[str, ...]) -> dict[str, tuple[int, int, int]]:
    """Shapes (b, n, m) of the operators that some statistics of a layer make."""
    shapes = {}
    for statistic in statistics:
        name = side_name(statistic)
        shapes[name] = layer.statistic_shape(statistic)
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
                 exponent: float = 1.) -> tuple[Stacked, Tensor]:
    """Negative powers of all sides' damped moments.

    Args:
        statistics: Moments, blocks or columns (k, b, n, m) by name.
        amounts: Of a side's name and moment or columns, what is added to its diagonal (k, b).
        solve: Of a side's name and damped matrices, their power and whether it succeeded (k, b).
        exponent: The power that `solve` takes, for columns.

    Returns:
        Operators by name, and a bool tensor (k,) that is False where one failed.
    """
    operator: Stacked = {}
    outcomes = []
    for statistic, given in statistics.items():
        name = side_name(statistic)
        amount = amounts(name, given)
        if COLUMNS in name:
            operator[name], scale, good = power_of_columns(given, amount, exponent)
            operator[name.replace(COLUMNS, SCALE)] = scale
        else:
            operator[name], good = solve(name, add_damping(given, amount))
        outcomes.append(good.all(-1))
    return operator, torch.stack(outcomes).all(0)


def two_sided(operator: Stacked, gradients: Tensor) -> Tensor:
    """``L G R`` for gradients (k, b, o, i); a side without an operator is left alone."""
    directions = gradients
    for side in SIDES:
        if side + MOMENT in operator:
            matrix = operator[side + MOMENT]
            directions = matrix @ directions if side == 'gradient' else directions @ matrix
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


def relative_damping(statistic: Tensor, damping: Tensor | float,
                     name: str = MOMENT) -> Tensor:
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

    One scalar a layer, over all its blocks, weight and joint bias together.
    """
    wanted = torch.linalg.vector_norm(gradients, dim=(1, 2, 3), keepdim=True)
    size = torch.linalg.vector_norm(directions, dim=(1, 2, 3), keepdim=True)
    return directions * (wanted / (size + 1e-12))
