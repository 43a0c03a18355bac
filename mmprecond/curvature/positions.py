"""Second moment of patches over kernel positions alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..linalg import (
    Operator,
    PositionBasis,
    PositionMatrix,
    RankSearch,
    Shape,
    largest_eigenvalue,
    position_power,
    trace,
)
from .form import Factor, Power
from .patch_form import PatchForm

if TYPE_CHECKING:
    from .layer import Layer
    from .rows import LayerRows


@dataclass(frozen=True)
class Positions(PatchForm):
    """Mean over channels of the positions' second moment; channels are left alone.

    With patches x (c x p), K is the sum of ``x'x / c`` (p x p), and ``R ~ I (x) K``. K is the
    closest of all such matrices to the moment R in the Frobenius norm. It has the scale of R: the
    traces of ``I (x) K`` and R are equal, and the largest eigenvalues of K and ``I (x) K`` are.
    Therefore a damping relative to lambda_max is added to K as it is, and the trailing 1 of a joint
    bias is on the same scale.
    """

    suffix: ClassVar[str] = 'kernel'
    basis: ClassVar[type[Operator]] = PositionBasis

    def keys(self, key: str) -> tuple[str, ...]:
        parts = ('positions', 'ones') if self.joint else ('positions',)
        return tuple(f'{key}_{part}' for part in parts)

    def shapes(self, blocks: int, size: int) -> tuple[Shape, ...]:
        return ((blocks, self.positions, self.positions), (blocks, 1, 1))[: 1 + self.joint]

    def measure(self, rows: LayerRows) -> tuple[Tensor, ...]:
        positions, ones = rows.position_moments(self.channels, self.positions)
        return (positions.div_(self.channels), ones)[: 1 + self.joint]

    def norm(self, samples: Sequence[Tensor], sizes: Sequence[float] | None) -> Tensor | float:
        """Frobenius norm ``sqrt(c) |K|`` of ``I (x) K`` (b, 1, 1); one divisor for both parts."""
        return self.channels**0.5 * torch.linalg.matrix_norm(samples[0])[..., None, None]

    def note(self, size: int) -> str:
        return f'by its {self.positions} positions, {self.channels} channels left alone'

    def outline(self, blocks: int, size: int, layer: Layer, search: RankSearch | None) -> Operator:
        p = self.positions
        return PositionMatrix.outline((blocks, p, p), (blocks, 1, int(self.joint)))

    def trace(self, factor: Factor) -> Tensor:
        total = self.channels * trace(factor.tensors[0])
        return total + factor.tensors[1][..., 0, 0] if self.joint else total

    def largest_eigenvalue(self, factor: Factor) -> Tensor:
        value = largest_eigenvalue(factor.tensors[0])
        return torch.maximum(value, factor.tensors[1][..., 0, 0]) if self.joint else value

    def damped_power(
        self,
        factor: Factor,
        amount: Callable[[Factor], Tensor],
        power: Power,
        previous: Operator | None,
    ) -> tuple[Operator, Tensor]:
        """Exact power by the eigendecomposition of K."""
        positions, damping = factor.tensors[0], amount(factor)
        function = self.eigenvalue_power(factor, damping, power)
        matrix, succeeded = position_power(positions, damping, function)
        return PositionMatrix(matrix, self.power_of_ones(factor, damping, function)), succeeded
