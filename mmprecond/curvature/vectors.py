"""Vector forms of a side: its mean row and its mean squared row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..linalg import Shape
from .form import Form

if TYPE_CHECKING:
    from .layer import Layer
    from .rows import LayerRows


class _VectorForm(Form):
    """Sum of a power of the rows' entries (b, n, 1)."""

    is_product: ClassVar[bool] = False
    power: ClassVar[int]

    def shapes(self, blocks: int, size: int) -> tuple[Shape, ...]:
        return ((blocks, size, 1),)

    def measure(self, rows: LayerRows) -> tuple[Tensor, ...]:
        return (rows.power_sum(self.power),)

    def measure_flops(self, rows: int, blocks: int, size: int, width: int) -> float:
        return float(blocks * size * rows)


@dataclass(frozen=True)
class Mean(_VectorForm):
    """The mean row."""

    suffix: ClassVar[str] = 'mean'
    power: ClassVar[int] = 1


@dataclass(frozen=True)
class CountedMean(_VectorForm):
    """Weighted sum of rows. Its last entry is the sum of the weights, the divisor of the mean."""

    is_special: ClassVar[bool] = True
    suffix: ClassVar[str] = 'mean'
    power: ClassVar[int] = 1

    def finalize(
        self, tensors: tuple[Tensor, ...], layers: Sequence[Layer], key: str
    ) -> tuple[Tensor, ...]:
        """Mean row; the last entry is the 1 of a joint bias, if there is one."""
        (tensor,) = tensors
        means = tensor / tensor[..., -1:, :]
        return (means[..., : layers[0].columns, :],)


@dataclass(frozen=True)
class Square(_VectorForm):
    """The mean squared row, the second moment's diagonal."""

    suffix: ClassVar[str] = 'square'
    power: ClassVar[int] = 2
