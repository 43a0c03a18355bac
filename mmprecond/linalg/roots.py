"""Fractional powers of damped second moments."""

from __future__ import annotations

import torch
from torch import Tensor

from .inverse import all_finite, cholesky_inverse


def inverse_power(matrix: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
    """``A^-exponent`` of symmetric positive definite matrices.

    The inverse itself by Cholesky factorisation, other powers by eigendecomposition.

    Args:
        matrix: A (..., n, n), symmetric; float32 or float64.
        exponent: Positive; 1 for the inverse, 0.5 for the inverse root.

    Returns:
        The power (..., n, n), and a bool tensor (...) that is False where a matrix was not positive
        definite or not finite (its power is then meaningless).
    """
    if exponent == 1:
        return cholesky_inverse(matrix)
    finite = all_finite(matrix)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    # eigh raises of what is not finite.
    values, vectors = torch.linalg.eigh(torch.where(finite[..., None, None], matrix, identity))
    good = finite & (values[..., 0] > 0)
    powers = torch.where(good[..., None], values, 1).pow(-exponent)
    result = (vectors * powers[..., None, :]) @ vectors.mT
    return result, good & all_finite(result)
