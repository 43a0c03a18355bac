"""Separable second moment of patches: partial traces over kernel positions and over channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..linalg import (
    Kronecker,
    KroneckerBasis,
    Operator,
    RankSearch,
    Shape,
    kronecker_power,
    largest_eigenvalue,
    trace,
)
from .form import Factor, Power
from .patch_form import PatchForm

if TYPE_CHECKING:
    from .layer import Layer
    from .rows import LayerRows


@dataclass(frozen=True)
class Separable(PatchForm):
    """Partial traces of the second moment of patches, whose Kronecker product replaces it.

    With patches x (c x p), C is the sum of ``x x'`` (c x c) and K the sum of ``x'x`` (p x p). Both
    have the trace tr of the moment R, and ``R ~ C (x) K / tr``.
    """

    suffix: ClassVar[str] = 'separable'
    basis: ClassVar[type[Operator]] = KroneckerBasis

    def keys(self, key: str) -> tuple[str, ...]:
        parts = ('channels', 'positions', 'ones') if self.joint else ('channels', 'positions')
        return tuple(f'{key}_{part}' for part in parts)

    def shapes(self, blocks: int, size: int) -> tuple[Shape, ...]:
        c, p = self.channels, self.positions
        return ((blocks, c, c), (blocks, p, p), (blocks, 1, 1))[: 2 + self.joint]

    def measure(self, rows: LayerRows) -> tuple[Tensor, ...]:
        return rows.separable_moments(self.channels, self.positions)[: 2 + self.joint]

    def norm(self, samples: Sequence[Tensor], sizes: Sequence[float] | None) -> Tensor | float:
        """Frobenius norm ``|C| |K| / tr`` of the product (b, 1, 1); one divisor for all parts."""
        channels, positions = (torch.linalg.matrix_norm(part) for part in samples[:2])
        total = trace(samples[0])
        tiny = torch.finfo(total.dtype).tiny
        return (channels * positions / total.clamp_min(tiny))[..., None, None]

    def note(self, size: int) -> str:
        return f'as {self.channels} channels x {self.positions} positions'

    def outline(self, blocks: int, size: int, layer: Layer, search: RankSearch | None) -> Operator:
        c, p = self.channels, self.positions
        kept = search.usual(c) if search is not None and search.takes(c) else c
        return Kronecker.outline(
            (blocks, c, kept),
            (blocks, p, p),
            (blocks, kept, p),
            (blocks, 1, p),
            (blocks, 1, int(self.joint)),
        )

    def trace(self, factor: Factor) -> Tensor:
        total = trace(factor.tensors[0])
        return total + factor.tensors[2][..., 0, 0] if self.joint else total

    def largest_eigenvalue(self, factor: Factor) -> Tensor:
        channels, positions = factor.tensors[:2]
        total = trace(channels).clamp_min(torch.finfo(channels.dtype).tiny)
        value = largest_eigenvalue(channels) * largest_eigenvalue(positions) / total
        return torch.maximum(value, factor.tensors[2][..., 0, 0]) if self.joint else value

    def damped_power(
        self,
        factor: Factor,
        amount: Callable[[Factor], Tensor],
        power: Power,
        previous: Operator | None,
    ) -> tuple[Operator, Tensor]:
        """Exact power in the eigenbases; with a search, of the channel directions that count."""
        channels, positions = factor.tensors[:2]
        damping = amount(factor)
        search = power.search if power.search and power.search.takes(self.channels) else None
        function = self.eigenvalue_power(factor, damping, power)
        basis, shifts, gain, rest, succeeded = kronecker_power(
            channels, positions, damping, power.exponent, search, function
        )
        ones = self.power_of_ones(factor, damping, function)
        return Kronecker(basis, shifts, gain, rest, ones), succeeded
