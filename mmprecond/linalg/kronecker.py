"""Kronecker products of a channel factor and a position factor, as the input side of convolutions.

The input rows of a convolution are patches: channels x kernel positions. Where their second moment
is ``C (x) K / tr``, with the partial traces C (c x c) and K (p x p) and their common trace tr, a
function of it is known in the eigenbases of C and K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .eigen import checked_eigh
from .lowrank import RankSearch, negligible_ratio, tail_eigenvalue
from .matrices import trace
from .operators import Operator, Shape
from .products import add_product, stacked_product


@dataclass(frozen=True, eq=False)
class Kronecker(Operator):
    """``sum_m (rest_m I + sum_j gain_jm u_j u_j') (x) (v_m v_m')``, and a number for a joint bias.

    Columns of zeros in U change nothing.

    Attributes:
        channels: U (k, b, c, r), orthonormal columns or zeros.
        positions: V (k, b, p, p), orthogonal.
        gain: (k, b, r, p).
        rest: (k, b, 1, p).
        ones: Factor of the last entry, (k, b, 1, 1); (k, b, 1, 0) without a joint bias.
    """

    channels: Tensor
    positions: Tensor
    gain: Tensor
    rest: Tensor
    ones: Tensor
    suffixes: ClassVar[tuple[str, ...]] = ('channels', 'positions', 'gain', 'rest', 'ones')

    @cached_property
    def rest_matrix(self) -> Tensor:
        """``sum_m rest_m v_m v_m'`` (k, b, p, p)."""
        return (self.positions * self.rest) @ self.positions.mT

    def right(self, matrices: Tensor) -> Tensor:
        """``M A`` for matrices M (k, b, o, c p), or (k, b, o, c p + 1) with a joint bias."""
        size = self.channels.shape[2] * self.positions.shape[2]
        weights = _by_position(matrices[..., :size], self.positions.shape[2])
        turned = _times_basis(weights, self.channels, self.positions)
        turned *= self.gain.mT[..., None, :]
        product = stacked_product(self.rest_matrix, weights.flatten(3)).view(weights.shape)
        added = _back(turned, self.positions).flatten(2, 3).flatten(0, 1)
        total = product.flatten(2, 3).flatten(0, 1)  # a view
        add_product(total, added, self.channels.mT.flatten(0, 1))
        return _by_output(product, matrices[..., size:], self.ones)

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
            (blocks, 1, positions),
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
        size = self.channels.shape[-1] * self.positions.shape[-1]
        weights = _by_position(matrices[..., :size], self.positions.shape[-1])
        turned = _times_basis(weights, self.channels, self.positions)
        return _by_output(turned, matrices[..., size:])

    def left(self, matrices: Tensor) -> Tensor:
        """``(U (x) V) M`` (see the base class)."""
        return self.map(lambda basis: basis.mT).right(matrices.mT).mT


def _by_position(matrices: Tensor, positions: int) -> Tensor:
    """Matrices (k, b, o, c p) as contiguous (k, b, p, o, c), where products over c are large."""
    return matrices.unflatten(-1, (-1, positions)).movedim(-1, 2).contiguous()


def _by_output(weights: Tensor, rest: Tensor, factor: Tensor | None = None) -> Tensor:
    """Weights (k, b, p, o, c) as matrices (k, b, o, c p + n), with further columns.

    Args:
        weights: The weights.
        rest: The columns (k, b, o, n).
        factor: Factor of the columns, which broadcasts; default: 1.
    """
    positions, channels = weights.shape[2], weights.shape[-1]
    size = positions * channels
    matrices = weights.new_empty(*rest.shape[:-1], size + rest.shape[-1])
    matrices[..., :size].unflatten(-1, (channels, positions)).copy_(weights.movedim(2, -1))
    if rest.shape[-1]:
        torch.mul(rest, 1.0 if factor is None else factor, out=matrices[..., size:])
    return matrices


def _times_basis(weights: Tensor, channels: Tensor, positions: Tensor) -> Tensor:
    """``M (U (x) V)`` of weights (k, b, p, o, c), as (k, b, p, o, r)."""
    turned = stacked_product(weights.flatten(2, 3), channels).view(*weights.shape[:-1], -1)
    return _back(turned, positions.mT)


def _back(turned: Tensor, positions: Tensor) -> Tensor:
    """``sum_m V_pm T_m`` of T (k, b, p, o, r)."""
    return stacked_product(positions, turned.flatten(3)).view(turned.shape)


def kronecker_power(
    channels: Tensor,
    positions: Tensor,
    damping: Tensor,
    exponent: float,
    search: RankSearch | None = None,
    function: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(C (x) K / tr + mu I)^-exponent`` in the eigenbases of C and K.

    A search omits channel directions whose eigenvalues are negligible beside the damping, as
    `low_rank_power` does: for each position direction, one value replaces those of all omitted
    channel directions.

    Args:
        channels: C (k, b, c, c), symmetric and positive semi-definite.
        positions: K (k, b, p, p), of the same trace.
        damping: mu (k, b).
        exponent: The exponent.
        search: Tolerance and limits, or None to keep all directions.
        function: Elementwise function of damped eigenvalues (k, b, c, p) in place of the power.

    Returns:
        The tensors U, V, gain and rest of `Kronecker`, and a bool tensor (k, b) that is False where
        a decomposition failed.
    """
    values, vectors, valid = checked_eigh(channels)
    shifts, basis, also_valid = checked_eigh(positions)
    total = trace(channels)[..., None, None]
    tiny = torch.finfo(channels.dtype).tiny
    eigenvalues = (values[..., :, None] * shifts[..., None, :]).clamp_min(0)
    eigenvalues = eigenvalues / total.clamp_min(tiny)
    damped = eigenvalues + damping[..., None, None]
    powers = damped.pow(-exponent) if function is None else function(damped)
    rest = torch.zeros_like(powers[..., :1, :])
    kept = size = channels.shape[-1]
    if search is not None:
        bound = negligible_ratio(exponent, search.tolerance) * damping
        kept = _directions_to_keep(eigenvalues, bound, search.limit(size))
    if search is not None and kept < size:
        omitted = eigenvalues[..., : size - kept, :]
        largest = omitted.amax(-2)
        tail = tail_eigenvalue(
            omitted.mean(-2),
            largest,
            damping[..., None],
            exponent,
            search.tolerance,
            largest > bound[..., None],
        )
        rest = tail.pow(-exponent)[..., None, :]
        vectors, powers = vectors[..., size - kept :], powers[..., size - kept :, :] - rest
    return vectors.contiguous(), basis, powers, rest, valid & also_valid & (damping > 0)


def _directions_to_keep(eigenvalues: Tensor, bound: Tensor, limit: int | None) -> int:
    """Number of channel directions to keep: those with an eigenvalue above the bound (k, b).

    Without a limit, all of them if they are more than half.
    """
    above = int((eigenvalues[..., -1] > bound[..., None]).sum(-1).max())
    size = eigenvalues.shape[-2]
    if limit is not None:
        return max(1, min(above, limit))
    return max(1, above) if above <= size // 2 else size
