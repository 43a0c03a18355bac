"""Preconditioning from both sides: damped powers, and products with the gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..curvature import GRADIENT, INPUT, Factor, Power, Side
from ..linalg import Operator, Operators
from .base import Factors


def damped_powers(
    factors: Factors,
    amount: Callable[[Side, Factor], Tensor],
    power: Power,
    previous: Operators | None = None,
) -> tuple[Operators, Tensor]:
    """Negative powers of all sides' damped moments.

    Args:
        factors: The moments, in any form.
        amount: Function that returns the damping (k, b), given a side and its factor.
        power: The power and its solver.
        previous: The last operators, as a start for the new ones, or None.

    Returns:
        Operators by slot, and a bool tensor (k,) that is False where one failed.
    """
    operators: Operators = {}
    outcomes = []
    for side, factor in factors.items():

        def side_amount(factor: Factor, side: Side = side) -> Tensor:
            return amount(side, factor)

        last: Operator | None = (previous or {}).get(side.name)
        operators[side.name], succeeded = factor.damped_power(side_amount, power, last)
        outcomes.append(succeeded.all(-1))
    return operators, torch.stack(outcomes).all(0)


def two_sided(operators: Operators, gradients: Tensor) -> Tensor:
    """``L G R`` for gradients (k, b, o, i); a side without an operator is left alone."""
    directions = gradients
    if GRADIENT.name in operators:
        directions = operators[GRADIENT.name].left(directions)
    if INPUT.name in operators:
        directions = operators[INPUT.name].right(directions)
    return directions


def relative_damping(factor: Factor, damping: Tensor | float) -> Tensor:
    """``damping lambda_max`` of each block of a factor: (k, b).

    A block that is negligible beside the layer's other blocks (a saturated head, a dead channel)
    gets a damping at the level of rounding errors. A layer of zeros gets 1.
    """
    value = factor.largest_eigenvalue()
    rounding = 10 * torch.finfo(factor.tensors[0].dtype).eps
    peak = value.amax(-1, keepdim=True) if value.dim() else value
    amount = damping * value + rounding * peak
    return torch.where(amount > 0, amount, 1)


def exact_relative_damping(factor: Factor, damping: Tensor | float) -> Tensor:
    """``damping lambda_max`` (k, b), with the layer's largest eigenvalue for a block of zeros.

    A layer of zeros gets 1.
    """
    value = factor.largest_eigenvalue()
    amount = damping * torch.where(value > 0, value, value.amax(-1, keepdim=True))
    return torch.where(amount > 0, amount, 1)
