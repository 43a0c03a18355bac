"""Damped powers of matrices that are known by few columns, never laid out in full."""

from __future__ import annotations

import torch
from torch import Tensor

from .eigen import checked_eigh
from .inverse import all_finite


def power_of_columns(columns: Tensor, damping: Tensor, exponent: float = 1.
                     ) -> tuple[Tensor, Tensor, Tensor]:
    """``(A A' + mu I)^-p`` for tall A, as ``mu^-p (I - U U')``.

    The inverse by a Cholesky factor of the small side, A'A + mu I = C C': U = A C'^-1. Other
    powers by its eigenvalues s: what U takes away of a direction is 1 - (mu / (s + mu))^p.

    Source: the Sherman-Morrison-Woodbury identity, as used by SKFAC (Tang et al., CVPR 2021).

    Args:
        columns: A (..., n, m); float32 or float64.
        damping: mu > 0 (...).
        exponent: p > 0.

    Returns:
        U (..., n, m), the scale mu^-p (..., 1, 1), and a bool tensor (...) that is False where the
        result is meaningless.
    """
    gram = columns.mT @ columns
    scale = damping[..., None, None].pow(-exponent)
    sound = (damping > 0) & scale.isfinite()[..., 0, 0]
    if exponent == 1:
        damped = gram.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(damping[..., None])
        factor, info = torch.linalg.cholesky_ex(damped)
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        factor = torch.where((info == 0)[..., None, None], factor, identity)
        basis = torch.linalg.solve_triangular(factor.mT, columns, upper=True, left=False)
        return basis, scale, sound & (info == 0) & all_finite(basis)
    values, vectors, good = checked_eigh(gram)
    values = values.clamp_min(0)
    floor = torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True)
    taken = -torch.expm1(-exponent * torch.log1p(values / damping[..., None]))
    weights = torch.where(values > floor, taken / values.clamp_min(floor), 0)
    basis = columns @ (vectors * weights.nan_to_num(posinf=0).sqrt()[..., None, :])
    return basis, scale, sound & good & all_finite(basis)


def apply_columns(matrix: Tensor, basis: Tensor, scale: Tensor) -> Tensor:
    """``scale M (I - U U')`` for M (..., o, n), U (..., n, m), scale (..., 1, 1): (..., o, n)."""
    return scale * (matrix - (matrix @ basis) @ basis.mT)


def nystrom_columns(sketch: Tensor, test: Tensor) -> Tensor:
    """Columns B with B B' close to the symmetric A >= 0 of a sketch ``Y = A Omega``.

    B B' = Y (Omega' Y)^+ Y', where the pseudo-inverse leaves out what is rounding.

    Source: the Nystroem approximation as in Tropp, Yurtsever, Udell and Cevher, SIAM J. Matrix
    Anal. Appl. 38(4), 2017. With m columns the expected error in the trace is at most
    1 + k / (m - k - 1) times the sum of the eigenvalues after the k-th, for any k < m - 1.

    Args:
        sketch: Y (..., n, m).
        test: Omega, broadcast to Y.

    Returns:
        B (..., n, m); NaN where it failed.
    """
    core = test.mT @ sketch
    values, vectors, good = checked_eigh((core + core.mT) / 2)
    smallest = values.shape[-1] * torch.finfo(values.dtype).eps * values[..., -1:]
    kept = values > smallest.clamp_min(0)
    weights = torch.where(kept, values, 1).rsqrt() * kept
    columns = sketch @ (vectors * weights[..., None, :])
    return torch.where(good[..., None, None], columns, torch.nan)
