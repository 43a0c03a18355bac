"""Symmetric products that compute only one half where that is faster."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..linalg import add_product

#: Approximate number of rows in a band of a product.
BAND = 256
#: Least number of summands for a product in bands. With fewer, a copy of the other half takes about
#: as long as its multiplication.
MANY = 128


def gram(chunks: Iterable[Tensor], total: Tensor) -> Tensor:
    """Writes the sum of ``X X'`` over chunks X (blocks, n, r) to total (blocks, n, n)."""
    height = _band_height(total.shape[-1])
    bands = total.split(height, 1)
    written = halved = False
    for rows in chunks:
        if rows.shape[-1] < MANY:
            add_product(total, rows, rows.mT, old=written)
        else:
            end = 0
            for band, part in zip(bands, rows.split(height, 1), strict=True):
                end += band.shape[1]
                add_product(band[..., :end], part, rows[:, :end].mT, old=written)
            halved = True
        written = True
    if not written:
        total.zero_()
    start = 0
    for band in bands if halved else ():
        end = start + band.shape[1]
        total[:, :start, start:end] = band[..., :start].mT
        start = end
    return total


def gram_flops(size: int, rows: int) -> float:
    """FLOPs of one such product (n x n) over r rows."""
    if rows < MANY:
        return 2.0 * size**2 * rows
    bands = -(-size // _band_height(size))
    return size**2 * rows * (1 + 1 / bands)


def _band_height(size: int) -> int:
    """Height of the bands of an n x n product; only the last band may be lower."""
    return -(-size // max(1, round(size / BAND)))
