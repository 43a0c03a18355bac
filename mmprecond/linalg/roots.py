"""Roots and other powers of damped second moments."""

from __future__ import annotations

import torch
from torch import Tensor

from .eigen import checked_eigh
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
    values, vectors, succeeded = checked_eigh(matrix)
    succeeded = succeeded & (values[..., 0] > 0)
    powers = torch.where(succeeded[..., None], values, 1).pow(-exponent)
    result = (vectors * powers[..., None, :]) @ vectors.mT
    return result, succeeded & all_finite(result)


def newton_schulz_inverse_root(matrix: Tensor, steps: int = 10) -> tuple[Tensor, Tensor]:
    """``A^-1/2`` of symmetric positive definite matrices by coupled Newton-Schulz iteration.

    From Y = A / tr A and Z = I, one step is ``T = (3 I - Z Y) / 2; Y <- Y T; Z <- T Z``; Z becomes
    (A / tr A)^-1/2. After few steps small eigenvalues are not converged: with ten, an eigenvalue of
    1e-4 tr A has about half its root, and none has more than 1.5^10 / sqrt(tr A). That bounds the
    result far more than AdaBK's damping does.

    Source: AdaBK's published code.

    Args:
        matrix: A (..., n, n), symmetric; float32 or float64.
        steps: Number of steps.

    Returns:
        The inverse roots (..., n, n), and a bool tensor (...) that is True where they are finite
        and A has a positive trace.
    """
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    y = matrix / trace
    z = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    for _ in range(steps):
        step = -0.5 * (z @ y)
        step.diagonal(dim1=-2, dim2=-1).add_(1.5)
        y, z = y @ step, step @ z
    root = z / trace.sqrt()
    # No more than that for a positive semi-definite matrix; a negative eigenvalue grows further.
    bound = 1.01 * 1.5**steps * matrix.shape[-1] ** 0.5
    bounded = torch.linalg.matrix_norm(z) <= bound
    return root, (trace[..., 0, 0] > 0) & bounded & all_finite(root)
