"""Convolutions: every output position is one row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .layer import EVERY_ROW_KIND, Call, Layer
from .moments import Moment
from .patches import Axis, PatchMoment
from .statistic import INPUT, Rows, Statistic


class Conv2dLayer(Layer):
    """`nn.Conv2d` with any stride, padding, padding mode, dilation and groups.

    Every output position is one row. Patches are laid out in chunks of at most `capture_mb`
    megabytes (at least one output row of one image), never for a whole feature map; where
    `PatchMoment` makes the input's moment (stride 1, zero padding) not at all.
    """

    module_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d,)
    row_kinds: ClassVar[tuple[type[Rows], ...]] = EVERY_ROW_KIND
    #: With fewer rows, or fewer channels, patches are multiplied faster than blocks are put
    #: together.
    few_rows, few_channels = 400, 8

    @classmethod
    def count_blocks(cls, module: Any) -> int:
        """The groups."""
        return module.groups

    def input_moment(self, module: Any, inputs: Tensor) -> Tensor:
        """Sum of x'x over all rows x of one call (see the base class)."""
        inputs = inputs if inputs.dim() == 4 else inputs[None]
        height, width = self._output_size(module, inputs)
        count = len(inputs) * height * width
        if not self._by_shifts(module, count):
            return super().input_moment(module, inputs)
        products = PatchMoment(*self._axes(module, inputs, (height, width)))
        image_bytes = self.working_dtype.itemsize * inputs[0].numel()
        images = max(1, int(min(self.capture_mb * 2**20 / max(1, image_bytes), len(inputs))))
        sums = inputs.new_zeros(self.blocks, self.columns - 1, dtype=self.working_dtype)
        for batch in inputs.split(images):
            batch = batch.to(self.working_dtype)
            products.add(batch.transpose(0, 1).unflatten(0, (self.blocks, -1)).transpose(2, 3))
            if self.bias is not None:
                view = self._patch_view(module, self._padded(module, batch), 0, height, width)
                sums += view.sum((-3, -2, -1)).flatten(1)
        if self.bias is None:
            return products.result()
        moment = self.unwritten_moment()
        moment[:, :-1, :-1] = products.result()
        return self.with_border(moment, sums, count)

    def measure_flops(self, call: Call, kept: tuple[Tensor, ...], output: Tensor,
                      statistic: Statistic) -> float:
        """About the floating-point operations of one call's statistic (see the base class)."""
        module: Any = call.module
        rows = self.sample_count(output) * self.position_count(output)
        if statistic != Statistic(INPUT, Moment()) or not self._by_shifts(module, rows):
            return super().measure_flops(call, kept, output, statistic)
        high, wide = module.kernel_size
        shifts = ((2 * high - 1) * (2 * wide - 1) + 1) / 2
        channels = module.in_channels / self.blocks
        margin = 1 + module.dilation[1] * (wide - 1) / output.shape[-1]
        return 2 * self.blocks * channels**2 * rows * shifts * margin

    def _by_shifts(self, module: Any, rows: int) -> bool:
        """True if `PatchMoment` makes the input's moment."""
        sliding = tuple(module.kernel_size) != (1, 1) and tuple(module.stride) == (1, 1)
        enough = (rows >= self.few_rows
                  and module.in_channels >= self.few_channels * self.blocks)
        return sliding and module.padding_mode == 'zeros' and enough

    def _axes(self, module: Any, inputs: Tensor, positions: tuple[int, int]) -> Iterator[Axis]:
        left, _, top, _ = self._pads(module)
        for size, count, kernel, step, pad in zip(
                inputs.shape[2:], positions, module.kernel_size, module.dilation, (top, left),
                strict=True):
            yield Axis(size, count, tuple(place * step - pad for place in range(kernel)))

    def input_rows(self, module: Any, inputs: Tensor) -> Iterator[Tensor]:
        if inputs.dim() == 3:
            inputs = inputs[None]
        height, width = self._output_size(module, inputs)
        row_bytes = self.working_dtype.itemsize * self.weight[0].numel() * self.blocks * width
        most = max(1, len(inputs) * height)
        budget = int(min(max(1., self.capture_mb * 2**20 / max(1, row_bytes)), most))
        images = max(1, budget // max(1, height))
        strip = min(height, budget)
        for batch in inputs.split(images):
            padded = self._padded(module, batch.to(self.working_dtype))
            for top in range(0, height, max(1, strip)):
                yield self._patches(module, padded, top, min(strip, height - top), width)

    def input_power_sum(self, module: Any, inputs: Tensor, power: int) -> tuple[Tensor, int]:
        # The sum over images comes first: patches are laid out of one image alone.
        inputs = inputs if inputs.dim() == 4 else inputs[None]
        height, width = self._output_size(module, inputs)
        image = inputs.to(self.working_dtype).pow(power).sum(0, keepdim=True)
        view = self._patch_view(module, self._padded(module, image), 0, height, width)
        return (view.sum((-3, -2, -1)).reshape(self.blocks, -1, 1),
                len(inputs) * height * width)

    def gradient_rows(self, gradient: Tensor) -> Tensor:
        if gradient.dim() == 3:
            gradient = gradient[None]
        positions = gradient.shape[2:].numel()
        rows = gradient.reshape(gradient.shape[0], self.blocks, self.rows, positions)
        return rows.permute(1, 2, 0, 3).flatten(2)

    def reduced_input(self, module: Any, inputs: Tensor) -> Tensor:
        inputs = inputs if inputs.dim() == 4 else inputs[None]
        height, width = self._output_size(module, inputs)
        padded = self._padded(module, inputs.to(self.working_dtype))
        patches = self._patch_view(module, padded, 0, height, width)
        return patches.mean((-2, -1)).flatten(1, 3)

    def reduced_gradient(self, gradient: Tensor) -> Tensor:
        gradient = gradient if gradient.dim() == 4 else gradient[None]
        return gradient.sum((2, 3)).t().reshape(self.blocks, self.rows, len(gradient))

    def sample_count(self, gradient: Tensor) -> int:
        return len(gradient) if gradient.dim() == 4 else 1

    def position_count(self, gradient: Tensor) -> int:
        return gradient.shape[-2:].numel()

    def sampled_input(self, module: Any, inputs: Tensor, drawn: Tensor) -> Tensor:
        inputs = inputs if inputs.dim() == 4 else inputs[None]
        height, width = self._output_size(module, inputs)
        padded = self._padded(module, inputs.to(self.working_dtype))
        view = self._patch_view(module, padded, 0, height, width)
        lines = drawn // width if width else drawn
        return view[..., lines, drawn - lines * width].flatten(1, 3).flatten(2)

    def sampled_gradient(self, gradient: Tensor, drawn: Tensor) -> Tensor:
        gradient = gradient if gradient.dim() == 4 else gradient[None]
        chosen = gradient.flatten(2)[..., drawn]
        rows = chosen.reshape(len(gradient), self.blocks, self.rows, len(drawn))
        return rows.permute(1, 2, 0, 3).flatten(2)

    def _patches(self, module: Any, padded: Tensor, top: int, height: int,
                 width: int) -> Tensor:
        """Patches of output rows [top, top + height): (blocks, i, images * height * width)."""
        view = self._patch_view(module, padded, top, height, width)
        return view.reshape(self.blocks, view.shape[1:4].numel(), len(padded) * height * width)

    def _patch_view(self, module: Any, padded: Tensor, top: int, height: int,
                    width: int) -> Tensor:
        """The same as a view (blocks, channels, kh, kw, images, height, width)."""
        batch, channels = padded.shape[:2]
        (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
        image, channel, line, pixel = padded.stride()
        group = channels // self.blocks
        return padded.as_strided(
            (self.blocks, group, kh, kw, batch, height, width),
            (group * channel, channel, dh * line, dw * pixel, image, sh * line, sw * pixel),
            padded.storage_offset() + top * sh * line)

    @staticmethod
    def _pads(module: Any) -> list[int]:
        """Padding as `F.pad` takes it: left, right, top, bottom."""
        pads: list[int] = []
        for axis in (1, 0):
            if module.padding == 'valid':
                pads += [0, 0]
            elif module.padding == 'same':
                total = module.dilation[axis] * (module.kernel_size[axis] - 1)
                pads += [total // 2, total - total // 2]
            else:
                pads += [module.padding[axis]] * 2
        return pads

    def _padded(self, module: Any, inputs: Tensor) -> Tensor:
        pads = self._pads(module)
        if not any(pads):
            return inputs
        if module.padding_mode == 'zeros':
            return F.pad(inputs, pads)
        return F.pad(inputs, pads, mode=module.padding_mode)

    def _output_size(self, module: Any, inputs: Tensor) -> tuple[int, int]:
        left, right, top, bottom = self._pads(module)
        sizes = (inputs.shape[-2] + top + bottom, inputs.shape[-1] + left + right)
        height, width = ((size - dilation * (kernel - 1) - 1) // stride + 1
                         for size, kernel, dilation, stride
                         in zip(sizes, module.kernel_size, module.dilation, module.stride,
                                strict=True))
        return height, width
