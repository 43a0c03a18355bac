"""Extreme eigenvalues."""

from __future__ import annotations

import torch
from torch import Tensor


def largest_eigenvalue(matrix: Tensor, rounds: int = 10) -> Tensor:
    """Estimates the largest eigenvalue of positive semi-definite matrices by power iteration.

    Starts from the vector of ones and takes two products a round, as the published code does; the
    estimate is a lower bound, often some per cent and at times a fifth too small. Where the
    ones are (nearly) in the null space - a softmax classifier's gradient second moment - the
    iteration starts from the matrix's column of largest diagonal instead.

    Source: power iteration as in NKFAC and AdaBK.

    Args:
        matrix: (..., n, n), symmetric positive semi-definite.
        rounds: Number of rounds.

    Returns:
        (...), one estimate per matrix; 0 for a zero matrix, never NaN.
    """
    size = matrix.shape[-1]
    scale = matrix.abs().amax((-2, -1), keepdim=True)
    matrix = matrix / torch.where(scale > 0, scale, 1)  # squares must neither over- nor underflow
    tiny = torch.finfo(matrix.dtype).tiny
    vector = matrix.new_ones(*matrix.shape[:-1], 1)
    image = torch.linalg.vector_norm(matrix @ vector, dim=(-2, -1))
    negligible = torch.finfo(matrix.dtype).eps ** 0.5 * size**0.5
    degenerate = image <= negligible * torch.linalg.matrix_norm(matrix)
    peak = matrix.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    column = torch.take_along_dim(matrix, peak, dim=-1)
    vector = torch.where(degenerate[..., None, None], column, vector)

    estimate = torch.zeros_like(image)
    for _ in range(rounds):
        vector = matrix @ vector
        vector = vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True).clamp_min(tiny)
        vector = matrix @ vector
        estimate = torch.linalg.vector_norm(vector, dim=(-2, -1))
    return estimate * scale[..., 0, 0]
