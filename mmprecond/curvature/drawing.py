"""Random positions of a call's rows, and the factors that scale their products to all rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .statistic import SampledRows

if TYPE_CHECKING:
    from .layer import Layer


@dataclass(frozen=True, eq=False)
class Draw:
    """Positions of each sample that stand for all.

    Attributes:
        positions: Their numbers (n,).
        factors: Factor of the products of each position's rows, a number or (n,).
    """

    positions: Tensor
    factors: Tensor | float

    def scale(self, rows: Tensor) -> Tensor:
        """Rows (b, m, samples n), whose products then estimate those of all positions."""
        if isinstance(self.factors, float):
            return rows * self.factors**0.5
        by_sample = rows.unflatten(2, (-1, len(self.positions)))
        return (by_sample * self.factors.sqrt().to(rows)).flatten(2)


class Drawing:
    """Draws the positions of one call; statistics of the same sampled rows take the same ones.

    Args:
        layer: The layer.
        module: The module that was called.
        gradient: Gradient of the loss with respect to the module's output.
        generator: Generator of the call's random choices, on the CPU.
    """

    def __init__(
        self, layer: Layer, module: nn.Module, gradient: Tensor, generator: torch.Generator
    ) -> None:
        self._layer, self._module, self._gradient = layer, module, gradient
        self.generator = generator
        self._draws: dict[SampledRows, Draw] = {}

    def draw(self, rows: SampledRows) -> Draw:
        """Positions for sampled rows."""
        if rows not in self._draws:
            self._draws[rows] = self._new_draw(rows)
        return self._draws[rows]

    def _new_draw(self, rows: SampledRows) -> Draw:
        layer, module, gradient = self._layer, self._module, self._gradient
        total = layer.position_count(module, gradient)
        taken = rows.count(layer.sample_count(module, gradient))
        if taken >= total:
            return Draw(torch.arange(total, device=gradient.device), 1.0)
        if rows.by_size:
            return draw_by_size(layer.position_sizes(module, gradient), taken, self.generator)
        positions = torch.randperm(total, generator=self.generator, device='cpu')[:taken]
        return Draw(positions.to(gradient.device), total / taken)


def draw_by_size(sizes: Tensor, taken: int, generator: torch.Generator) -> Draw:
    """Draws positions by the squared norms of their rows, so that few large rows are not missed.

    Priority sampling: the positions with the largest size / u, with u uniform in (0, 1], stand for
    max(size, t) each, where t is the largest of the others. Sums are unbiased, and their trace has
    almost no variance (Duffield, Lund and Thorup, "Priority sampling for estimation of arbitrary
    subset sums", 2007).

    Args:
        sizes: Squared norms (positions,), of more positions than are taken.
        taken: Number of positions to draw.
        generator: Generator on the CPU.
    """
    uniform = 1 - torch.rand(len(sizes), generator=generator, device='cpu')
    priorities, order = (sizes / uniform.to(sizes)).topk(taken + 1)
    drawn = sizes[order[:-1]]
    # Rows of zeros count nothing; 0 / 0 must not make them NaN.
    factors = (drawn.clamp_min(priorities[-1]) / drawn).where(drawn != 0, 0.0)
    return Draw(order[:-1], factors)
