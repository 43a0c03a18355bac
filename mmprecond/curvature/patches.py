"""Second moment of a convolution's patches, without patches in memory.

Consider two entries of a patch that are dy rows and dx columns apart. At every position of the
patch they read two pixels with the same shift (dy, dx). The sum of their products over all
positions is therefore the image's autocorrelation at that shift, except for pixels at the borders
that one of the entries never reads. A 3 x 3 kernel has 13 such shifts up to the sign, whereas the
product of explicit patches has 81 blocks.

Source: the shifts of kfac-jax's patches second moment, with exact borders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..linalg import stacked_product

#: A range of indices.
Span = tuple[int, int]
#: Blocks by the positions of two kernel entries: both rows, then both columns.
BlockSums = dict[tuple[int, int, int, int], Tensor]


@dataclass(frozen=True)
class Axis:
    """One axis of a convolution of stride 1 with zero padding.

    Attributes:
        size: Number of pixels.
        positions: Number of output positions.
        offsets: Pixel of each kernel entry at output position 0; negative in the padding.
    """

    size: int
    positions: int
    offsets: tuple[int, ...]

    @property
    def entries(self) -> int:
        return len(self.offsets)

    @property
    def reach(self) -> int:
        """Largest shift between two entries."""
        return self.offsets[-1] - self.offsets[0]

    def shift(self, first: int, second: int) -> int:
        """Shift from the pixel of one entry to that of another."""
        return self.offsets[second] - self.offsets[first]

    def whole(self, shift: int) -> Span:
        """Pixels whose shifted pixel is also in the image."""
        return max(0, -shift), max(0, -shift, min(self.size, self.size - shift))

    def met(self, first: int, second: int) -> Span:
        """Pixels of `whole` that the first entry reads at some output position."""
        low, high = self.whole(self.shift(first, second))
        start = self.offsets[first]
        low = min(max(low, start), high)
        return low, max(low, min(high, start + self.positions))


class PatchMoment:
    """Sum of the outer products of patches over positions and batches of images.

    Args:
        rows: The vertical axis.
        columns: The horizontal axis.
    """

    def __init__(self, rows: Axis, columns: Axis) -> None:
        self.rows = rows
        self.columns = columns
        self._sums: BlockSums = {}
        self._zero = torch.zeros(0)

    def add(self, images: Tensor) -> None:
        """Adds images (groups, channels, height, images, width).

        In this layout a range of rows of all images is contiguous. Zeros between lines represent
        shifted pixels outside the image.
        """
        groups, channels, height, count, width = images.shape
        margin = self.columns.reach
        self._zero = images.new_zeros(groups, channels, channels)
        line = count * (width + margin)
        flat = images.new_zeros(groups, channels, margin + height * line + margin)
        whole = flat[..., margin : margin + height * line]
        whole = whole.view(groups, channels, height, count, width + margin)
        whole[..., :width] = images
        for dy, pairs in self._pairs_by_shift(self.rows).items():
            for span in _split_spans([self.rows.met(*pair) for pair in pairs]):
                sums = self._row_products(flat, whole, span, dy)
                for first, second in pairs:
                    low, high = self.rows.met(first, second)
                    if low <= span[0] and span[1] <= high:
                        self._accumulate(first, second, sums)

    def _accumulate(self, first: int, second: int, sums: dict[tuple[int, int], Tensor]) -> None:
        for (left, right), value in sums.items():
            key = first, second, left, right
            self._sums[key] = self._sums[key] + value if key in self._sums else value

    def _row_products(
        self, flat: Tensor, whole: Tensor, span: Span, dy: int
    ) -> dict[tuple[int, int], Tensor]:
        """Blocks of all pairs of columns, over some rows and the rows dy below them."""
        line = whole.shape[3] * whole.shape[4]
        start = self.columns.reach + span[0] * line
        length = (span[1] - span[0]) * line
        window = flat[..., start : start + length]
        upper, lower = whole[:, :, span[0] : span[1]], whole[:, :, span[0] + dy : span[1] + dy]
        sums = {}
        for dx, pairs in self._pairs_by_shift(self.columns, both=dy != 0).items():
            shifted = start + dy * line + dx
            product = stacked_product(window, flat[..., shifted : shifted + length].mT)
            for pair in pairs:
                low, high = self.columns.met(*pair)
                if low == high:
                    sums[pair] = torch.zeros_like(product)  # exact, unlike a rounded difference
                    continue
                sums[pair] = product
                for low, high in self._skipped_columns(*pair):
                    sums[pair] = sums[pair] - (
                        upper[..., low:high].flatten(2)
                        @ lower[..., low + dx : high + dx].flatten(2).mT
                    )
        return sums

    def _skipped_columns(self, first: int, second: int) -> Iterator[Span]:
        """Columns that the first entry reads at no output position."""
        low, high = self.columns.whole(self.columns.shift(first, second))
        start, end = self.columns.met(first, second)
        for span in ((low, start), (end, high)):
            if span[0] < span[1]:
                yield span

    @staticmethod
    def _pairs_by_shift(axis: Axis, both: bool = False) -> dict[int, list[tuple[int, int]]]:
        """Pairs of entries by shift; unless `both`, the second is not before the first."""
        pairs: dict[int, list[tuple[int, int]]] = {}
        for first in range(axis.entries):
            for second in range(0 if both else first, axis.entries):
                pairs.setdefault(axis.shift(first, second), []).append((first, second))
        return pairs

    def result(self) -> Tensor:
        """Moment (groups, i, i), where i counts (channel, row, column)."""
        high, wide = self.rows.entries, self.columns.entries
        places = [(row, column) for row in range(high) for column in range(wide)]
        blocks = torch.stack(
            [self._block(*first, *second) for first in places for second in places]
        )
        groups, channels, _ = blocks.shape[1:]
        blocks = blocks.view(len(places), len(places), groups, channels, channels)
        size = channels * len(places)
        return blocks.permute(2, 3, 0, 4, 1).reshape(groups, size, size)

    def _block(self, top: int, left: int, bottom: int, right: int) -> Tensor:
        known = self._sums.get((top, bottom, left, right))
        return self._sums.get((bottom, top, right, left), self._zero).mT if known is None else known


def _split_spans(spans: list[Span]) -> list[Span]:
    """Cuts spans wherever one of them begins or ends; omits empty ones."""
    edges = sorted({edge for low, high in spans for edge in (low, high) if low < high})
    return [
        (low, high)
        for low, high in pairwise(edges)
        if any(start <= low and high <= end for start, end in spans)
    ]
