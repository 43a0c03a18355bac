"""Attention as one layer: sums over its queries, keys and values.

Symbols of one head: Q (n_q, d), K and V (n_k, d), logits A = scale Q K' + bias + mask,
S = softmax(A) by row, O = S V, and J_i = diag(s_i) - s_i s_i' for query i. X has the input rows of
the projection. A window is one independent attention: a Swin window, or the tokens of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..calls import Call
from ..layer import Layer
from ..statistic import ALL, INPUT, Side, Statistic
from .heads import Heads
from .sides import DECLARED, KEY_CURVATURE, AttentionSide


class AttentionLayer(Layer):
    """Projections W_Q, W_K, W_V of an attention module, in one weight (3 h d, c).

    The blocks are the heads of W_Q, then of W_K, then of W_V. Each block is a matrix (d, c). The
    bias takes the plain rule unless it is given. A given bias takes part in the means, and in no
    other statistic.

    Attributes:
        heads: Number of heads.
        max_windows: Most windows measured in one call. Each call draws them anew, and scales the
            sums to all windows.
    """

    heads: int

    needs_full_precision: ClassVar[bool] = True  # softmax_gram

    def __init__(
        self,
        name: str,
        modules: list[nn.Module],
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        *,
        max_windows: int = 256,
        **options: Any,
    ) -> None:
        block: Any = modules[0]
        self.heads = int(block.num_heads)
        self.max_windows = max_windows
        super().__init__(name, modules, weight, bias, **options)

    @classmethod
    def count_blocks(cls, module: Any) -> int:
        """Number of heads of the three projections together."""
        return 3 * int(module.num_heads)

    @classmethod
    def weight_owner(cls, module: nn.Module) -> tuple[str, str]:
        """Relative name of the submodule that owns the weight, and the weight's name there."""
        return 'qkv', 'weight'

    @property
    def compressible(self) -> bool:
        """False, because each side has only the form that it declares."""
        return False

    @property
    def inputs(self) -> int:
        """Number of different input moments: 1 where Q and K multiply the same rows."""
        return 1

    @property
    def is_square(self) -> bool:
        """True if there is one query for each key, as the thesis's form of W_K needs."""
        return True

    def has_side(self, side: Side) -> bool:
        """True for the input and for sides of attention."""
        known = side == INPUT or isinstance(side, AttentionSide)
        return known and (self.is_square or side != KEY_CURVATURE.side)

    def lacks(self, statistic: Statistic) -> str:
        """Reason why the layer cannot measure a statistic, or ''; each side has one form."""
        if not self.has_side(statistic.side) or statistic.rows != ALL:
            return super().lacks(statistic)
        form = self._declared(statistic.side).form
        if type(statistic.form) is not form:
            return f'its side {statistic.side.name!r} has the form {form.__name__} alone'
        return ''

    def size_of(self, side: Side) -> tuple[int, int]:
        """Blocks and length of a side; 1 block (or 2 for inputs) if heads share the side."""
        return self._declared(side).size(self)

    def count_rows(self, call: Call, gradient: Tensor, statistics: Sequence[Statistic]) -> int:
        """Number of queries of one call."""
        return gradient.numel() // max(1, gradient.shape[-1])

    def measure_flops(
        self, call: Call, kept: tuple[Tensor, ...], output: Tensor, statistic: Statistic
    ) -> float:
        """Approximate FLOPs of one call's statistic (see the base class)."""
        windows, queries, keys = self.sizes(call, kept)
        side = self._declared(statistic.side)
        return min(windows, self.max_windows) * side.flops(self, queries, keys)

    def measure(
        self,
        call: Call,
        kept: tuple[Tensor, ...],
        gradient: Tensor,
        statistics: Sequence[Statistic],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Sums over all windows, estimated from at most `max_windows` of them."""
        windows, queries, keys = self.sizes(call, kept)
        chosen = torch.arange(windows if keys else 0, device='cpu')
        if windows > self.max_windows:
            drawn = torch.randperm(windows, generator=generator, device='cpu')
            chosen = drawn[: self.max_windows].sort().values
        sides = {statistic.key: self._declared(statistic.side) for statistic in statistics}
        sums = {
            key: self.weight.new_zeros(side.sum_shape(self, keys), dtype=self.working_dtype)
            for key, side in sides.items()
        }
        lays_out = any(side.lays_out_rows for side in sides.values())
        for chunk in chosen.split(self._chunk(queries, keys, lays_out)):
            heads = self.read(call, kept, chunk.to(gradient.device))
            for key, total in sums.items():
                total += sides[key].measure(heads)
        for key, total in sums.items():
            sums[key] = sides[key].finish(total, len(chosen))
            sums[key] *= windows / max(1, len(chosen))
        return sums

    def read_flops(self, queries: int, keys: int) -> float:
        """Approximate FLOPs per window of values that `read` has to recompute."""
        return 0.0

    def sizes(self, call: Call, kept: tuple[Tensor, ...]) -> tuple[int, int, int]:
        """Number of windows, and of queries and keys per window."""
        windows, tokens = kept[0].shape[:2]
        return windows, tokens, tokens

    def read(self, call: Call, kept: tuple[Tensor, ...], chosen: Tensor) -> Heads:
        """Reads some windows of a call."""
        raise TypeError(f'{type(self).__name__} must say how it is read')

    @staticmethod
    def _declared(side: Side) -> AttentionSide:
        """Attention's own version of a side."""
        return side if isinstance(side, AttentionSide) else DECLARED[side]

    def _chunk(self, queries: int, keys: int, lays_out_rows: bool) -> int:
        """Number of windows that are measured at a time, within `capture_mb`."""
        tokens = max(queries, keys)
        numbers = 8 * self.heads * keys * tokens + 8 * tokens * (self.columns + 2 * self.rows)
        if lays_out_rows:
            numbers += 3 * self.heads * tokens * self.columns
        size = numbers * self.working_dtype.itemsize
        return max(1, int(min(self.capture_mb * 2**20 / max(1, size), self.max_windows)))
