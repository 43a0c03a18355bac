"""Traces, identities and diagonals of stacked square matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def trace(matrices: Tensor) -> Tensor:
    """Traces (...) of matrices (..., n, n)."""
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def identity_like(matrices: Tensor) -> Tensor:
    """The identity (n, n), of the dtype and device of matrices (..., n, n)."""
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


def add_to_diagonal(matrices: Tensor, amount: Tensor) -> Tensor:
    """``A + mu I`` for matrices (..., n, n) and amounts mu (...)."""
    shifted = matrices.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(amount[..., None])
    return shifted
