"""Kronecker products of a channel factor and a position factor, as the input side of convolutions.

The input rows of a convolution are patches: channels x kernel positions. Where their second moment
is ``C (x) K / tr``, with the partial traces C (c x c) and K (p x p) and their common trace tr, a
function of it is known in the eigenbases of C and K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .eigen import checked_eigh
from .operators import Operator, Shape
from .products import stacked_product


@dataclass(frozen=True, eq=False)
class Kronecker(Operator):
    """``rest I + sum_jm gain_jm (u_j u_j') (x) (v_m v_m')``, and a number for a joint bias.

    Columns of zeros in U change nothing.

    Attributes:
        channels: U (k, b, c, r), orthonormal columns or zeros.
        positions: V (k, b, p, p), orthogonal.
        gain: (k, b, r, p).
        rest: (k, b, 1, 1).
        ones: Factor of the last entry, (k, b, 1, 1); (k, b, 1, 0) without a joint bias.
    """

    channels: Tensor
    positions: Tensor
    gain: Tensor
    rest: Tensor
    ones: Tensor
    suffixes: ClassVar[tuple[str, ...]] = ('channels', 'positions', 'gain', 'rest', 'ones')

    def right(self, matrices: Tensor) -> Tensor:
        """``M A`` for matrices M (k, b, o, c p), or (k, b, o, c p + 1) with a joint bias."""
        c, p = self.channels.shape[2], self.positions.shape[2]
        weights = matrices[..., : c * p]
        turned = _times_basis(weights, self.channels, self.positions)
        scaled = turned * self.gain.mT[:, :, None]
        product = torch.addcmul(
            _times_transposed(scaled, self.channels, self.positions), weights, self.rest
        )
        if self.ones.shape[-1]:
            product = torch.cat([product, matrices[..., c * p :] * self.ones], -1)
        return product

    def left(self, matrices: Tensor) -> Tensor:
        """``A M`` (see the base class)."""
        return self.right(matrices.mT).mT

    def unify(self, other: Operator) -> tuple[Operator, Operator]:
        """Pads the channel directions of the narrower one with zeros."""
        if not isinstance(other, Kronecker):
            return self, other
        width = max(self.channels.shape[-1], other.channels.shape[-1])
        return self._widened(width), other._widened(width)

    def _widened(self, width: int) -> Kronecker:
        more = width - self.channels.shape[-1]
        return Kronecker(
            F.pad(self.channels, (0, more)),
            self.positions,
            F.pad(self.gain, (0, 0, 0, more)),
            self.rest,
            self.ones,
        )

    def shape_in(self, form: type[Operator], tensors: list[Tensor]) -> list[Shape]:  # type: ignore[override]
        """Shapes with any number of channel directions up to c (see the base class)."""
        blocks, channels, _ = tuple(self.channels.shape[1:])
        positions, entries = self.positions.shape[-1], self.ones.shape[-1]
        width = tensors[0].shape[-1] if tensors[0].dim() == 3 else channels
        width = min(width, channels)
        return [
            (blocks, channels, width),
            (blocks, positions, positions),
            (blocks, width, positions),
            (blocks, 1, 1),
            (blocks, 1, entries),
        ]


@dataclass(frozen=True, eq=False)
class KroneckerBasis(Operator):
    """Orthogonal ``U (x) V``; the entry of a joint bias stays as it is.

    Attributes:
        channels: U (k, b, c, c).
        positions: V (k, b, p, p).
    """

    channels: Tensor
    positions: Tensor
    suffixes: ClassVar[tuple[str, ...]] = ('channels', 'positions')

    def right(self, matrices: Tensor) -> Tensor:
        """``M (U (x) V)`` for matrices M (k, b, o, c p), or (k, b, o, c p + 1)."""
        k, b, o, _ = matrices.shape
        size = self.channels.shape[-1] * self.positions.shape[-1]
        turned = _times_basis(matrices[..., :size], self.channels, self.positions)
        product = turned.transpose(3, 4).reshape(k, b, o, size)
        return torch.cat([product, matrices[..., size:]], -1)

    def left(self, matrices: Tensor) -> Tensor:
        """``(U (x) V) M`` (see the base class)."""
        return self.map(lambda basis: basis.mT).right(matrices.mT).mT


def _times_basis(weights: Tensor, channels: Tensor, positions: Tensor) -> Tensor:
    """``M (U (x) V)`` of weights (k, b, o, c p), as (k, b, o, p, r).

    Channels come first: a product on the layout (o p) x c is one call per layer, and what is left
    for the positions has r in place of c channels.
    """
    k, b, o, _ = weights.shape
    c, p = channels.shape[2], positions.shape[2]
    turned = weights.reshape(k, b, o, c, p).transpose(3, 4).reshape(k, b, o * p, c)
    turned = stacked_product(turned, channels).view(k, b, o, p, -1)
    return torch.matmul(positions.mT[:, :, None], turned)


def _times_transposed(turned: Tensor, channels: Tensor, positions: Tensor) -> Tensor:
    """``T (U (x) V)'`` of T (k, b, o, p, r), as weights (k, b, o, c p)."""
    k, b, o, p, _ = turned.shape
    back = torch.matmul(positions[:, :, None], turned).flatten(2, 3)
    back = stacked_product(back, channels.mT).view(k, b, o, p, -1)
    return back.transpose(3, 4).reshape(k, b, o, -1)


def kronecker_power(
    channels: Tensor,
    positions: Tensor,
    damping: Tensor,
    exponent: float,
    tolerance: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(C (x) K / tr + mu I)^-exponent`` in the eigenbases of C and K.

    With a tolerance t, channel directions are omitted if all their eigenvalues are so far below the
    damping that one value for all of them is right to the relative error t, and if they are more
    than half.

    Args:
        channels: C (k, b, c, c), symmetric and positive semi-definite.
        positions: K (k, b, p, p), of the same trace.
        damping: mu (k, b).
        exponent: The exponent.
        tolerance: t, less than 1, or None to keep all directions.

    Returns:
        The tensors U, V, gain and rest of `Kronecker`, and a bool tensor (k, b) that is False where
        a decomposition failed.
    """
    values, vectors, valid = checked_eigh(channels)
    shifts, basis, also_valid = checked_eigh(positions)
    trace = channels.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    tiny = torch.finfo(channels.dtype).tiny
    eigenvalues = (values[..., :, None] * shifts[..., None, :]).clamp_min(0)
    eigenvalues = eigenvalues / trace.clamp_min(tiny)
    mu = damping[..., None, None]
    powers = (eigenvalues + mu).pow(-exponent)
    rest = torch.zeros_like(mu)
    if tolerance is not None:
        kept = _directions_to_keep(eigenvalues, mu, exponent, tolerance)
        size = channels.shape[-1]
        if kept <= size // 2:
            # Relative errors of the largest and the least omitted value are equal.
            least = powers[..., size - kept - 1, -1][..., None, None]
            most = mu.pow(-exponent)
            rest = 2 * least * most / (least + most)
            vectors, powers = vectors[..., size - kept :], powers[..., size - kept :, :] - rest
    return vectors.contiguous(), basis, powers, rest, valid & also_valid & (damping > 0)


def _directions_to_keep(eigenvalues: Tensor, mu: Tensor, exponent: float, tolerance: float) -> int:
    """Number of channel directions, at least 1, with an eigenvalue above the bound."""
    bound = mu * (((1 + tolerance) / (1 - tolerance)) ** (1 / exponent) - 1)
    above = (eigenvalues[..., -1:] > bound).sum((-2, -1))
    return max(1, int(above.max()))
