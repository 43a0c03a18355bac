"""Eigendecompositions that report failure instead of raising."""

from __future__ import annotations

import torch
from torch import Tensor

from .inverse import all_finite
from .matrices import identity_like


def checked_eigh(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.linalg.eigh` of symmetric matrices, one by one if the batch does not converge.

    Args:
        matrix: (..., n, n).

    Returns:
        Eigenvalues (..., n) and eigenvectors (..., n, n), and a bool tensor (...) that is False
        where a matrix is not finite or its decomposition failed (the identity replaces it).
    """
    finite = all_finite(matrix)
    identity = identity_like(matrix)
    safe = torch.where(finite[..., None, None], matrix, identity)
    try:
        values, vectors = torch.linalg.eigh(safe)
        return values, vectors, finite & all_finite(vectors)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if matrix.dim() == 2:
            return identity.diagonal(), identity, torch.zeros_like(finite)
        parts = [checked_eigh(single) for single in safe.reshape(-1, *matrix.shape[-2:])]
        values, vectors, succeeded = (torch.stack(part) for part in zip(*parts, strict=True))
        return (
            values.reshape(matrix.shape[:-1]),
            vectors.reshape(matrix.shape),
            finite & succeeded.reshape(finite.shape),
        )
