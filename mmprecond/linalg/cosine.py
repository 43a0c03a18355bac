"""The orthonormal cosine basis."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine_basis(size: int, dtype: torch.dtype, device: torch.device | str = 'cpu') -> Tensor:
    """The matrix of the discrete cosine transform, with unit columns.

    ``Q_ij = sqrt(2 / n) cos(pi i (2 j + 1) / 2n)``, the row i = 0 times ``sqrt(1 / 2)``.

    Args:
        size: n.
        dtype: Dtype of the result.
        device: Device of the result.

    Returns:
        Q (n, n); ``Q' Q = Q Q' = I``.
    """
    # Angles repeat after 4n steps of pi / 2n, so integer multiples lose no precision.
    table = torch.arange(4 * size, dtype=torch.float64).mul_(math.pi / (2 * size)).cos_()
    table = table.mul_((2 / size) ** 0.5).to(dtype).to(device)
    numbers = torch.arange(size, device=device)
    basis = table[torch.outer(numbers, 2 * numbers + 1).remainder_(4 * size)]
    basis[0] *= 0.5**0.5
    return basis
