"""Symmetric products, each half computed once."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

#: Products are formed in bands of about so many rows.
BAND = 512


def gram(chunks: Iterable[Tensor], total: Tensor) -> Tensor:
    """Adds the sum of ``X X'`` over chunks X (blocks, n, r) to a total of zeros (blocks, n, n)."""
    height = _band(total.shape[-1])
    bands = total.split(height, 1)
    for rows in chunks:
        end = 0
        for band, part in zip(bands, rows.split(height, 1), strict=True):
            end += band.shape[1]
            band[..., :end].baddbmm_(part, rows[:, :end].mT)
    start = 0
    for band in bands:
        end = start + band.shape[1]
        total[:, :start, start:end] = band[..., :start].mT
        start = end
    return total


def gram_flops(size: int, rows: int) -> float:
    """Floating-point operations of one such product of n x n over r rows."""
    bands = -(-size // _band(size))
    return size**2 * rows * (1 + 1 / bands)


def _band(size: int) -> int:
    """Height of the bands of an n x n product: equal but for the last."""
    return -(-size // max(1, round(size / BAND)))
