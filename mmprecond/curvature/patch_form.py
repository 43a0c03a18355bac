"""Contract of forms that treat the channels and the positions of patches apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from typing_extensions import Self

from ..checks import check_count, check_flag
from .form import Factor, Form, Power
from .gram import gram_flops

if TYPE_CHECKING:
    from .layer import Layer


@dataclass(frozen=True)
class PatchForm(Form):
    """Form for input rows that are patches x (c x p), of channels and positions.

    Patches are the input rows of convolutions, and of linear layers behind a flattened feature map.
    The trailing 1 of a joint bias has a row and a column of its own: its covariance with the patch
    is left out.

    Attributes:
        channels: c, channels of one block.
        positions: p, positions of the kernel.
        joint: Whether the bias is joint with the weight.
    """

    channels: int
    positions: int
    joint: bool

    @classmethod
    def of(cls, layer: Layer) -> Self | None:
        """The form for the patches of a layer, or None if its input rows are no patches."""
        joint = layer.bias is not None
        channels = (layer.columns - joint) // layer.kernel_positions
        return cls(channels, layer.kernel_positions, joint) if layer.kernel_positions > 1 else None

    def __post_init__(self) -> None:
        check_count('channels', self.channels)
        check_count('positions', self.positions)
        check_flag('joint', self.joint)

    def length(self, factor: Factor) -> int:
        return self.channels * self.positions + self.joint

    def eigenvalue_power(
        self, factor: Factor, damping: Tensor, power: Power
    ) -> Callable[[Tensor], Tensor]:
        """Function that returns the powers of damped eigenvalues (k, b, n, m) of a factor."""
        trace = factor.trace() + factor.length * damping
        return lambda values: power.of_eigenvalues(values, trace)

    def power_of_ones(
        self, factor: Factor, damping: Tensor, function: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Power (k, b, 1, 1) of a joint bias's entry, the last tensor; else (k, b, 1, 0)."""
        if not self.joint:
            return damping.new_empty(*damping.shape, 1, 0)
        return function(factor.tensors[-1] + damping[..., None, None])

    def position_flops(self, rows: int) -> float:
        """FLOPs of the positions' partial trace of one block."""
        return self.channels * gram_flops(self.positions, rows)

    def measure_flops(self, rows: int, blocks: int, size: int, width: int) -> float:
        if size == self.positions:
            return blocks * self.position_flops(rows)
        return blocks * gram_flops(size, rows) if size > 1 else 0.0
