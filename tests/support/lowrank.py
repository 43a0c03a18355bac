"""Moments of given spectra."""

from __future__ import annotations

import torch
from torch import Tensor


def moment(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues (..., n)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(
        *eigenvalues.shape, eigenvalues.shape[-1], generator=generator, dtype=torch.float64
    )
    basis = torch.linalg.qr(drawn)[0]
    return (basis * eigenvalues[..., None, :]) @ basis.mT


def decay(n: int, power: float) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64) ** -power
