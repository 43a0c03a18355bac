"""Largest eigenvalues."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def largest_eigenvalue(matrix: Tensor, rounds: int = 10) -> Tensor:
    """Estimates the largest eigenvalue of positive semi-definite matrices by power iteration.

    The iteration starts from the vector of ones and takes two products per round, as in the
    published code. The estimate is a lower bound: often some per cent too small, at times a fifth.
    The ones may be (nearly) in the null space, as for the gradient second moment of a softmax
    classifier. The iteration then starts from the column with the largest diagonal entry.

    Source: power iteration as in NKFAC and AdaBK.

    Args:
        matrix: (..., n, n), symmetric positive semi-definite.
        rounds: Number of rounds.

    Returns:
        (...), one estimate per matrix; 0 for a zero matrix, never NaN.
    """
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    scale = _safe_scale(diagonal[..., None])  # no entry is larger
    diagonal = diagonal / scale[..., 0]
    return scale[..., 0, 0] * _power_iteration(
        lambda vector: matrix @ (vector / scale), diagonal, rounds
    )


def largest_eigenvalue_of_columns(columns: Tensor, rounds: int = 10) -> Tensor:
    """Estimates the largest eigenvalue of ``A A'``, from columns A (..., n, m) alone."""
    scale = _safe_scale(columns)
    columns = columns / scale
    return scale[..., 0, 0].square() * _power_iteration(
        lambda vector: columns @ (columns.mT @ vector), columns.square().sum(-1), rounds
    )


def _safe_scale(matrix: Tensor) -> Tensor:
    """Divisor of a matrix that prevents overflow and underflow of squares."""
    scale = matrix.abs().amax((-2, -1), keepdim=True)
    return torch.where(scale > 0, scale, 1)


def _power_iteration(product: Callable[[Tensor], Tensor], diagonal: Tensor, rounds: int) -> Tensor:
    """Power iteration, given the product with a matrix and its diagonal (..., n)."""
    vector = torch.ones_like(diagonal)[..., None]
    image = torch.linalg.vector_norm(product(vector), dim=(-2, -1))
    negligible = torch.finfo(diagonal.dtype).eps ** 0.5 * diagonal.shape[-1] ** 0.5
    degenerate = image <= negligible * diagonal.sum(-1)
    peak = torch.zeros_like(vector).scatter_(-2, diagonal.argmax(-1)[..., None, None], 1)
    vector = torch.where(degenerate[..., None, None], product(peak), vector)
    tiny = torch.finfo(vector.dtype).tiny
    estimate = image
    for _ in range(rounds):
        vector = product(vector)
        vector = vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True).clamp_min(tiny)
        vector = product(vector)
        estimate = torch.linalg.vector_norm(vector, dim=(-2, -1))
    return estimate
