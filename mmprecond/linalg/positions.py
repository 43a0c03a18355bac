"""Matrices of kernel positions alone, as the input side of layers on patches.

The input rows of a convolution are patches: channels x kernel positions. A matrix ``I (x) A`` acts
on the positions of each channel and leaves the channels alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .eigen import checked_eigh
from .operators import Operator
from .products import stacked_product

#: Number of positions below which channels are multiplied two at a time: for 9 positions in 0.4 of
#: the time on a CPU, for 49 the opposite.
NARROW = 16


@dataclass(frozen=True, eq=False)
class PositionMatrix(Operator):
    """``I (x) A`` with symmetric A, and a number for a joint bias.

    Attributes:
        positions: A (k, b, p, p).
        ones: Factor of the last entry, (k, b, 1, 1); (k, b, 1, 0) without a joint bias.
    """

    positions: Tensor
    ones: Tensor
    suffixes: ClassVar[tuple[str, ...]] = ('positions', 'ones')

    def right(self, matrices: Tensor) -> Tensor:
        """``M (I (x) A)`` for matrices M (k, b, o, c p), or (k, b, o, c p + 1) with a bias."""
        entries = self.ones.shape[-1]
        size = matrices.shape[-1] - entries
        product = _times_positions(matrices[..., :size], self.positions)
        if entries:
            product = torch.cat([product, matrices[..., size:] * self.ones], -1)
        return product

    def left(self, matrices: Tensor) -> Tensor:
        """``(I (x) A) M`` (see the base class)."""
        return self.right(matrices.mT).mT


@dataclass(frozen=True, eq=False)
class PositionBasis(Operator):
    """Orthogonal ``I (x) V``; the entry of a joint bias stays as it is.

    Attributes:
        positions: V (k, b, p, p).
    """

    positions: Tensor
    suffixes: ClassVar[tuple[str, ...]] = ('positions',)

    def right(self, matrices: Tensor) -> Tensor:
        """``M (I (x) V)`` for matrices M (k, b, o, c p), or (k, b, o, c p + 1)."""
        width, p = matrices.shape[-1], self.positions.shape[-1]
        size = width - width % p  # p > 1, so that a bias is what remains
        product = _times_positions(matrices[..., :size], self.positions)
        return torch.cat([product, matrices[..., size:]], -1) if size < width else product

    def left(self, matrices: Tensor) -> Tensor:
        """``(I (x) V) M`` (see the base class)."""
        return self.map(lambda basis: basis.mT).right(matrices.mT).mT


def _times_positions(weights: Tensor, positions: Tensor) -> Tensor:
    """``M (I (x) A)`` of weights (k, b, o, c p), as one product on the layout (o c) x p.

    A product that is only a few columns wide is slow. Few positions are therefore multiplied for
    two channels at a time, by A twice on the diagonal.
    """
    p = positions.shape[-1]
    if p < NARROW and weights.shape[-1] % (2 * p) == 0:
        paired = positions.new_zeros(*positions.shape[:2], 2 * p, 2 * p)
        paired[..., :p, :p] = paired[..., p:, p:] = positions
        positions, p = paired, 2 * p
    rows = weights.reshape(*weights.shape[:2], -1, p)
    return stacked_product(rows, positions).reshape(weights.shape)


def position_power(
    positions: Tensor, damping: Tensor, function: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Function of ``A + mu I`` by the eigendecomposition of A.

    Args:
        positions: A (k, b, p, p), symmetric and positive semi-definite.
        damping: mu (k, b).
        function: Elementwise function of damped eigenvalues (k, b, p, 1).

    Returns:
        The results (k, b, p, p), and a bool tensor (k, b) that is False where a decomposition
        failed or a damping is not positive.
    """
    values, vectors, valid = checked_eigh(positions)
    powers = function((values.clamp_min(0) + damping[..., None])[..., None])
    return (vectors * powers.mT) @ vectors.mT, valid & (damping > 0)
