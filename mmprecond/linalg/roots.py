"""Roots and other powers of damped second moments."""

from __future__ import annotations

import torch
from torch import Tensor

from .eigen import checked_eigh
from .inverse import all_finite, cholesky_inverse
from .matrices import identity_like, trace


def inverse_power(
    matrix: Tensor, exponent: float, least: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """``A^-exponent`` of symmetric positive definite matrices.

    The inverse uses a Cholesky factorisation, other powers use an eigendecomposition.

    Args:
        matrix: A (..., n, n), symmetric; float32 or float64.
        exponent: Positive; 1 for the inverse, 0.5 for the inverse root.
        least: Least eigenvalue in exact arithmetic, for powers other than 1; smaller ones are
            rounding errors; default: 0.

    Returns:
        The power (..., n, n), and a bool tensor (...) that is False where a matrix was not positive
        definite or not finite (its power is then meaningless).
    """
    if exponent == 1:
        return cholesky_inverse(matrix)
    values, vectors, succeeded = checked_eigh(matrix)
    values = values.clamp(min=least)
    succeeded = succeeded & (values[..., 0] > 0)
    powers = torch.where(succeeded[..., None], values, 1).pow(-exponent)
    result = (vectors * powers[..., None, :]) @ vectors.mT
    return result, succeeded & all_finite(result)


def newton_schulz_inverse_root(matrix: Tensor, steps: int = 10) -> tuple[Tensor, Tensor]:
    """``A^-1/2`` of symmetric positive definite matrices by coupled Newton-Schulz iteration.

    The iteration starts from Y = A / tr A and Z = I. One step is
    ``T = (3 I - Z Y) / 2; Y <- Y T; Z <- T Z``, and Z converges to (A / tr A)^-1/2. Small
    eigenvalues do not converge in few steps. After ten steps an eigenvalue of 1e-4 tr A has about
    half its inverse root, and no inverse root exceeds 1.5^10 / sqrt(tr A). This bound is much
    tighter than that of AdaBK's damping.

    Source: AdaBK's published code.

    Args:
        matrix: A (..., n, n), symmetric; float32 or float64.
        steps: Number of steps.

    Returns:
        The inverse roots (..., n, n), and a bool tensor (...) that is True where they are finite
        and A has a positive trace.
    """
    scale = trace(matrix)[..., None, None]
    y = matrix / scale
    z = identity_like(matrix).expand_as(matrix)
    for _ in range(steps):
        step = -0.5 * (z @ y)
        step.diagonal(dim1=-2, dim2=-1).add_(1.5)
        y, z = y @ step, step @ z
    root = z / scale.sqrt()
    # Positive semi-definite matrices stay below this bound; a negative eigenvalue exceeds it.
    bound = 1.01 * 1.5**steps * matrix.shape[-1] ** 0.5
    bounded = torch.linalg.matrix_norm(z) <= bound
    return root, (scale[..., 0, 0] > 0) & bounded & all_finite(root)


def newton_schulz_inverse_root_of_values(values: Tensor, total: Tensor, steps: int) -> Tensor:
    """Eigenvalues of `newton_schulz_inverse_root` of a matrix with these eigenvalues.

    Args:
        values: Eigenvalues of A (...).
        total: tr A, broadcast to the values.
        steps: Number of steps.
    """
    y, z = values / total, torch.ones_like(values)
    for _ in range(steps):
        step = 1.5 - 0.5 * z * y
        y, z = y * step, z * step
    return z / total.sqrt()
