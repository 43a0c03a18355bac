"""Inverses of damped second moments, exact and by Newton iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from .matrices import identity_like
from .products import stacked_product


def cholesky_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Exact inverse of symmetric positive definite matrices by Cholesky factorisation.

    Args:
        matrix: (..., n, n), symmetric; float32 or float64.

    Returns:
        The inverse (..., n, n), and a bool tensor (...) that is False where a matrix was not
        positive definite or its inverse is not finite (that inverse is then meaningless).
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    identity = identity_like(matrix)
    # A failed factor may be singular, and cholesky_inverse raises for singular factors.
    factor = torch.where((info == 0)[..., None, None], factor, identity)
    inverse = torch.cholesky_inverse(factor)
    return inverse, (info == 0) & all_finite(matrix) & all_finite(inverse)


def newton_inverse(
    matrix: Tensor, inverse: Tensor, steps: int = 1, optimal: bool = False
) -> tuple[Tensor, Tensor]:
    """Refines approximate inverses B of A by damped Newton (Schulz) iteration.

    With P = B A and E = P - I, one step is ``B <- (I - a E) B``, after which E is E - a E P. If
    ``||E||_F < 1``, then a = 1 and convergence is quadratic. Otherwise a = 1 / ||P||_F, which keeps
    the step contracting. With `optimal`, a minimizes ``||E - a E P||_F`` instead.

    Source: thesis Algorithm 2 and Proposition 3.2. The test uses the current iterate, as in the
    published code.

    Args:
        matrix: A (..., n, n), symmetric positive definite.
        inverse: B (..., n, n), the inverses of the previous refresh; not modified.
        steps: Number of Newton steps.
        optimal: Whether to minimize the residual where ``||E||_F >= 1``. It costs one more product
            a step.

    Returns:
        The refined inverses (..., n, n), and a bool tensor (...) that is True where they are
        finite.
    """
    for _ in range(steps):
        product = stacked_product(inverse, matrix)
        size = torch.linalg.matrix_norm(product)
        diagonal = product.diagonal(dim1=-2, dim2=-1)
        diagonal -= 1
        residual = torch.linalg.matrix_norm(product)
        diagonal += 1
        damped_step = _optimal_step_size(product) if optimal else 1 / size
        step = torch.where(residual < 1, torch.ones_like(size), damped_step)[..., None, None]
        inverse = (1 + step) * inverse - step * stacked_product(product, inverse)
    return inverse, all_finite(inverse)


def definite_newton_inverse(
    matrix: Tensor, inverse: Tensor, steps: int = 1
) -> tuple[Tensor, Tensor]:
    """Refines inverses with the optimal step size; computes those anew that are not definite.

    A step beyond ``1 / (p - 1)``, with p the largest eigenvalue of B A, turns a positive definite B
    into an indefinite one. The optimal step can exceed this limit.

    Args:
        matrix: A (..., n, n), symmetric positive definite.
        inverse: B (..., n, n); not modified.
        steps: Number of Newton steps.

    Returns:
        As `newton_inverse`.
    """
    refined, finite = newton_inverse(matrix, inverse, steps, optimal=True)
    _, info = torch.linalg.cholesky_ex((refined + refined.mT) / 2)
    definite = (info == 0) & finite
    if bool(definite.all()):
        return refined, finite
    exact, succeeded = cholesky_inverse(matrix)
    return torch.where(definite[..., None, None], refined, exact), definite | succeeded


def _optimal_step_size(product: Tensor) -> Tensor:
    """Step sizes (...) that minimize ``||E - a E P||_F``, E = P - I, for products P (..., n, n)."""
    change = stacked_product(product, product) - product
    residual = product - identity_like(product)
    return (residual * change).sum((-2, -1)) / change.square().sum((-2, -1))


def all_finite(matrix: Tensor) -> Tensor:
    """True if all entries of each matrix (..., n, n) are finite: (...)."""
    return matrix.isfinite().flatten(-2).all(-1)
