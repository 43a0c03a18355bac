"""Minimizers of quadratics with a norm of each row."""

from __future__ import annotations

import torch
from torch import Tensor

#: Most Newton steps, and the relative error at which they end.
MAX_STEPS, TOLERANCE = 50, 1e-6


def shrink_rows(linear: Tensor, diagonal: Tensor, weight: float) -> Tensor:
    """Minimizes ``x' D x / 2 - b' x + weight |x|`` for each row.

    x is zero where ``|b| <= weight``. Elsewhere it is ``(D + weight / n)^-1 b``, with n its norm:
    the root of ``h(n) = sum_i (b_i / (D_i n + weight))^2 = 1``. Newton's method solves
    ``h(n)^(-1/2) = 1``. This function is concave, so steps from below do not overshoot.

    Args:
        linear: Rows b (k, m).
        diagonal: Diagonals D (k, m), positive.
        weight: Weight of the norm, at least 0.

    Returns:
        The minimizers (k, m).
    """
    if weight == 0:
        return linear / diagonal
    lengths = linear.norm(dim=1, keepdim=True)
    norms = (lengths - weight).clamp(min=0) / diagonal.amax(1, keepdim=True)
    for _ in range(MAX_STEPS):
        shrunk = diagonal * norms + weight
        ratios = linear / shrunk
        size = ratios.norm(dim=1, keepdim=True)
        if bool(((size - 1).abs() <= TOLERANCE).logical_or(lengths <= weight).all()):
            break
        slope = (ratios.square() * diagonal / shrunk).sum(1, keepdim=True)
        step = size.square() * (size - 1) / slope.clamp(min=torch.finfo(slope.dtype).tiny)
        norms = (norms + step).clamp(min=0)
    minimizers = linear * norms / (diagonal * norms + weight)
    return torch.where(lengths <= weight, 0.0, minimizers)
