"""Rows of one side of one call, as the input of a form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .drawing import Drawing
from .form import Form
from .gram import gram
from .statistic import ALL, REDUCED, SampledRows, Statistic

if TYPE_CHECKING:
    from .layer import Layer


@dataclass(eq=False)
class LayerRows:
    """Rows of one call of a layer that a statistic sums over.

    Attributes:
        layer: The layer.
        module: The module that was called.
        inputs: Input of the module.
        gradient: Gradient of the loss with respect to the module's output; of statistics of the
            gradient matrix that matrix (b, o, i).
        statistic: The statistic.
        drawing: Random choices of the call.
    """

    layer: Layer
    module: nn.Module
    inputs: Tensor
    gradient: Tensor
    statistic: Statistic
    drawing: Drawing

    @property
    def key(self) -> str:
        """The statistic's name."""
        return self.statistic.key

    def unwritten(self, form: Form) -> Tensor:
        """Uninitialised tensor (b, n, m) for the sum."""
        (shape,) = form.shapes(*self.layer.size_of(self.statistic.side))
        return self.layer.weight.new_empty(shape, dtype=self.layer.working_dtype)

    def moment(self) -> Tensor:
        """Sum of x'x (b, n, n); the layer's own method computes it for all input rows."""
        if not self.statistic.side.of_gradient and self.statistic.rows == ALL:
            return self.layer.input_moment(self.module, self.inputs)
        return gram(self.chunks(), self.unwritten(self.statistic.form))

    def separable_moments(self, channels: int, positions: int) -> tuple[Tensor, Tensor, Tensor]:
        """Partial traces (b, c, c) and (b, p, p) of the patches' moment, and the sum of the ones.

        Args:
            channels: c.
            positions: p.
        """
        layer: Any = self.layer  # of patches
        total = self._unwritten_part(channels)
        if self._come_as_patches:
            gram([self._reduced_patches(channels, positions).flatten(2)], total)
        else:
            gram(layer.channel_rows(self.module, self.inputs), total)
        return total, *self.position_moments(channels, positions)

    def position_moments(self, channels: int, positions: int) -> tuple[Tensor, Tensor]:
        """Partial trace (b, p, p) of the patches' moment, and the sum of the ones.

        Of sampled rows, all positions of some images and channels are taken instead: each channel
        has rows of its own here.

        Args:
            channels: c.
            positions: p.
        """
        layer: Any = self.layer  # of patches
        total, rows = self._unwritten_part(positions), self.statistic.rows
        if self._come_as_patches:
            patches = self._reduced_patches(channels, positions)
            gram([patches.transpose(1, 2).flatten(2)], total)
            return total, self._reduced_rows[:, -1:].square().sum(2, keepdim=True)
        inputs, scale = self.inputs, 1.0
        if isinstance(rows, SampledRows):
            inputs, scale = layer.sampled_maps(inputs, rows, self.drawing.generator)
        gram(layer.position_rows(self.module, inputs), total)
        count = layer.sample_count(self.module, self.gradient)
        count *= layer.position_count(self.module, self.gradient)
        return total.mul_(scale), total.new_full((layer.blocks, 1, 1), count)

    @property
    def _come_as_patches(self) -> bool:
        """True for rows that are few enough to be laid out as patches."""
        return self.statistic.rows == REDUCED or self.statistic.of_matrix

    @cached_property
    def _reduced_rows(self) -> Tensor:
        """Reduced rows, or those of the gradient matrix, in one chunk (b, n, rows)."""
        (rows,) = self.chunks()
        return rows

    def _reduced_patches(self, channels: int, positions: int) -> Tensor:
        """Reduced rows as patches (b, c, p, rows)."""
        rows = self._reduced_rows[:, : channels * positions]
        return rows.unflatten(1, (channels, positions))

    def _unwritten_part(self, size: int) -> Tensor:
        """Uninitialised tensor (b, size, size) for a partial trace."""
        shape = (self.layer.blocks, size, size)
        return self.layer.weight.new_empty(shape, dtype=self.layer.working_dtype)

    def power_sum(self, power: int) -> Tensor:
        """Sum of the rows' entries to a power (b, n, 1)."""
        layer = self.layer
        if self.statistic.side.of_gradient:
            rows = layer.gradient_rows(self.module, self.gradient.to(layer.working_dtype))
            return rows.pow(power).sum(2, keepdim=True)
        sums, count = layer.input_power_sum(self.module, self.inputs, power)
        if layer.bias is not None:
            sums = torch.cat([sums, sums.new_full((layer.blocks, 1, 1), count)], 1)
        return sums

    def chunks(self) -> Iterator[Tensor]:
        """Yields the rows in chunks (b, n, rows); inputs have the trailing 1 of a joint bias."""
        layer, rows = self.layer, self.statistic.rows
        if self.statistic.of_matrix:
            yield self.gradient if self.statistic.side.of_gradient else self.gradient.mT
            return
        if not self.statistic.side.of_gradient:
            if rows == REDUCED:
                yield layer.with_ones(layer.reduced_input(self.module, self.inputs))
            elif isinstance(rows, SampledRows):
                draw = self.drawing.draw(rows)
                sampled = layer.sampled_input(self.module, self.inputs, draw.positions)
                yield draw.scale(layer.with_ones(sampled))
            else:
                yield from map(layer.with_ones, layer.input_rows(self.module, self.inputs))
            return
        if isinstance(rows, SampledRows):
            draw = self.drawing.draw(rows)
            sampled = layer.sampled_gradient(self.module, self.gradient, draw.positions)
            yield draw.scale(sampled.to(layer.working_dtype))
            return
        gradient = self.gradient.to(layer.working_dtype)
        reduced = rows == REDUCED
        yield (layer.reduced_gradient if reduced else layer.gradient_rows)(self.module, gradient)
