"""Convolutions: every output position is one row, with its patch as the input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calls import Call
from .gram import gram_flops
from .layer import EVERY_ROW_KIND, Layer
from .moments import Moment
from .patch_form import PatchForm
from .patches import Axis, PatchMoment
from .separable import Separable
from .statistic import INPUT, REDUCED, Rows, SampledRows, Statistic

#: Pixels of one channel that are worth as much as one sampled row of all channels.
PIXELS_PER_ROW = 64


class ConvLayer(Layer):
    """A convolution with any stride, padding, padding mode, dilation and groups.

    Every output position is one row. Patches are laid out in chunks of at most `capture_mb`
    megabytes (at least one output line of one image), never for a whole feature map.

    Attributes:
        axes: Number of spatial axes.
    """

    axes: ClassVar[int]
    row_kinds: ClassVar[tuple[type[Rows], ...]] = EVERY_ROW_KIND

    @classmethod
    def count_blocks(cls, module: Any) -> int:
        """The groups."""
        return module.groups

    @property
    def kernel_positions(self) -> int:
        """Positions of the kernel."""
        return self.weight.shape[2:].numel()

    def input_rows(self, module: Any, inputs: Tensor) -> Iterator[Tensor]:
        for view in self._patch_chunks(module, inputs):
            columns = view.shape[1 : 2 + self.axes].numel()
            yield view.reshape(self.blocks, columns, view.shape[2 + self.axes :].numel())

    def position_rows(self, module: Any, inputs: Tensor) -> Iterator[Tensor]:
        """Chunks (blocks, p, rows) with the positions' partial trace of the patches' moment."""
        kernel = tuple(range(2, 2 + self.axes))
        rest = tuple(range(2 + self.axes, 3 + 2 * self.axes))
        for view in self._patch_chunks(module, inputs):
            yield view.permute(0, *kernel, 1, *rest).reshape(self.blocks, self.kernel_positions, -1)

    def sampled_maps(
        self, inputs: Tensor, rows: SampledRows, generator: torch.Generator
    ) -> tuple[Tensor, float]:
        """Random images and channels, with the factor that scales their sums to all of them.

        At least one image and one channel per group are taken, and as many as the budget allows
        with `PIXELS_PER_ROW` pixels of one channel for each row.
        """
        maps = self._add_batch_axis(inputs).unflatten(1, (self.blocks, -1))
        drawn_images, drawn_channels = (
            torch.randperm(count, generator=generator, device='cpu')[:taken].to(inputs.device)
            for count, taken in zip(maps.shape[:3:2], _sample_size(maps, rows), strict=True)
        )
        drawn = maps[drawn_images][:, :, drawn_channels]
        return drawn.flatten(1, 2), maps.numel() / max(1, drawn.numel())

    def channel_rows(self, module: Any, inputs: Tensor) -> Iterator[Tensor]:
        """Chunks (blocks, c, rows) with the channels' partial trace of the patches' moment."""
        # A pixel counts as often as patches read it, so no patch has to be laid out.
        inputs = self._add_batch_axis(inputs)
        size = self._output_size(module, inputs)
        weight = self._reads(module, inputs, size).sqrt()
        image_bytes = self.working_dtype.itemsize * max(1, inputs[0].numel() if len(inputs) else 1)
        images = max(1, int(min(self.capture_mb * 2**20 / image_bytes, len(inputs))))
        for batch in inputs.split(images):
            maps = batch.to(self.working_dtype)
            if module.padding_mode != 'zeros':
                maps = self._pad(module, maps)
            yield self._maps_to_rows((maps * weight.to(maps)).flatten(2))

    def _reads(self, module: Any, inputs: Tensor, size: torch.Size) -> Tensor:
        """Number of kernel entries that read each pixel, of maps that are padded unless by 0."""
        pads = self._padding(module)
        counts = torch.ones((), dtype=torch.float64)
        for axis, pixels in enumerate(inputs.shape[-self.axes :]):
            before, after = pads[-2 * axis - 2], pads[-2 * axis - 1]
            entries = torch.arange(module.kernel_size[axis])[:, None] * module.dilation[axis]
            read = (entries + torch.arange(size[axis]) * module.stride[axis]).flatten()
            times = torch.bincount(read, minlength=before + pixels + after)
            if module.padding_mode == 'zeros':  # zeros add nothing
                times = times[before : before + pixels]
            counts = counts[..., None] * times
        return counts

    def _patch_chunks(self, module: Any, inputs: Tensor) -> Iterator[Tensor]:
        """Patches in views (see `_patch_view`) of at most `capture_mb` megabytes."""
        inputs = self._add_batch_axis(inputs)
        size = self._output_size(module, inputs)
        line = size[1:].numel()
        row_bytes = self.working_dtype.itemsize * self.weight[0].numel() * self.blocks * line
        total_lines = max(1, len(inputs) * size[0])
        budget = int(min(max(1.0, self.capture_mb * 2**20 / max(1, row_bytes)), total_lines))
        images = max(1, budget // max(1, size[0]))
        strip = min(size[0], budget)
        for batch in inputs.split(images):
            padded = self._pad(module, batch.to(self.working_dtype))
            for top in range(0, size[0], max(1, strip)):
                lines = min(strip, size[0] - top)
                yield self._patch_view(module, padded, torch.Size((lines, *size[1:])), top)

    def input_power_sum(self, module: Any, inputs: Tensor, power: int) -> tuple[Tensor, int]:
        # The sum over images comes first: patches are laid out of one image alone.
        inputs = self._add_batch_axis(inputs)
        size = self._output_size(module, inputs)
        image = inputs.to(self.working_dtype).pow(power).sum(0, keepdim=True)
        view = self._patch_view(module, self._pad(module, image), size)
        places = tuple(range(-1 - self.axes, 0))
        return view.sum(places).reshape(self.blocks, -1, 1), len(inputs) * size.numel()

    def gradient_rows(self, module: nn.Module, gradient: Tensor) -> Tensor:
        return self._maps_to_rows(self._add_batch_axis(gradient).flatten(2))

    def reduced_input(self, module: Any, inputs: Tensor) -> Tensor:
        patches = self._extract_patches(module, inputs)
        return patches.mean(tuple(range(-self.axes, 0))).flatten(1, 1 + self.axes)

    def reduced_gradient(self, module: nn.Module, gradient: Tensor) -> Tensor:
        return self._maps_to_rows(self._add_batch_axis(gradient).flatten(2).sum(2, keepdim=True))

    def sample_count(self, module: nn.Module, gradient: Tensor) -> int:
        return len(gradient) if gradient.dim() == 2 + self.axes else 1

    def position_count(self, module: nn.Module, gradient: Tensor) -> int:
        return gradient.shape[-self.axes :].numel()

    def position_sizes(self, module: nn.Module, gradient: Tensor) -> Tensor:
        maps = self._add_batch_axis(gradient).flatten(2)
        return torch.linalg.vector_norm(maps, dim=(0, 1), dtype=self.working_dtype).square()

    def sampled_input(self, module: Any, inputs: Tensor, drawn: Tensor) -> Tensor:
        view = self._extract_patches(module, inputs)
        size = view.shape[-self.axes :]
        places = torch.unravel_index(drawn, size) if size.numel() else [drawn] * self.axes
        return view[(..., *places)].flatten(1, 1 + self.axes).flatten(2)

    def sampled_gradient(self, module: nn.Module, gradient: Tensor, drawn: Tensor) -> Tensor:
        return self._maps_to_rows(self._add_batch_axis(gradient).flatten(2)[..., drawn])

    def measure_flops(
        self, call: Call, kept: tuple[Tensor, ...], output: Tensor, statistic: Statistic
    ) -> float:
        """Approximate FLOPs of one call's statistic (see the base class)."""
        flops = super().measure_flops(call, kept, output, statistic)
        form, rows = statistic.form, statistic.rows
        if not isinstance(form, PatchForm) or rows == REDUCED:
            return flops
        count = self.count_rows(call, output, (statistic,))
        maps = self._add_batch_axis(kept[0]).unflatten(1, (self.blocks, -1))
        if isinstance(form, Separable):  # its channels are read at every pixel, once
            pixels = len(maps) * maps.shape[3:].numel()
            products = gram_flops(form.channels, pixels) - gram_flops(form.channels, count)
            flops += self.blocks * products
        if isinstance(rows, SampledRows):
            images, channels = _sample_size(maps, rows)
            left_out = 1 - images * channels / max(1, maps.shape[0] * maps.shape[2])
            flops -= left_out * self.blocks * form.position_flops(count)
        return flops

    def _add_batch_axis(self, tensor: Tensor) -> Tensor:
        """The tensor with a leading axis of images."""
        return tensor if tensor.dim() == 2 + self.axes else tensor[None]

    def _maps_to_rows(self, maps: Tensor) -> Tensor:
        """Maps (images, channels, positions) as rows (blocks, channels a block, rows)."""
        images, channels, positions = maps.shape
        rows = maps.reshape(images, self.blocks, channels // self.blocks, positions)
        return rows.permute(1, 2, 0, 3).flatten(2)

    def _extract_patches(self, module: Any, inputs: Tensor) -> Tensor:
        """The patches of all output positions, as a view (see `_patch_view`)."""
        inputs = self._add_batch_axis(inputs)
        padded = self._pad(module, inputs.to(self.working_dtype))
        return self._patch_view(module, padded, self._output_size(module, inputs))

    def _patch_view(self, module: Any, padded: Tensor, size: torch.Size, top: int = 0) -> Tensor:
        """Patches of the output lines [top, top + size[0]), complete along all other axes.

        Returns:
            A view (blocks, channels, *kernel, images, *size).
        """
        image, channel, *pixels = padded.stride()
        group = padded.shape[1] // self.blocks
        within = [step * pixel for step, pixel in zip(module.dilation, pixels, strict=True)]
        across = [step * pixel for step, pixel in zip(module.stride, pixels, strict=True)]
        return padded.as_strided(
            (self.blocks, group, *module.kernel_size, len(padded), *size),
            (group * channel, channel, *within, image, *across),
            padded.storage_offset() + top * across[0],
        )

    def _padding(self, module: Any) -> list[int]:
        """Padding as `F.pad` takes it: before and after, from the last axis to the first."""
        pads: list[int] = []
        for axis in reversed(range(self.axes)):
            if module.padding == 'valid':
                pads += [0, 0]
            elif module.padding == 'same':
                total = module.dilation[axis] * (module.kernel_size[axis] - 1)
                pads += [total // 2, total - total // 2]
            else:
                pads += [module.padding[axis]] * 2
        return pads

    def _pad(self, module: Any, inputs: Tensor) -> Tensor:
        pads = self._padding(module)
        if not any(pads):
            return inputs
        if module.padding_mode == 'zeros':
            return F.pad(inputs, pads)
        return F.pad(inputs, pads, mode=module.padding_mode)

    def _output_size(self, module: Any, inputs: Tensor) -> torch.Size:
        pads = self._padding(module)
        totals = [before + after for before, after in zip(pads[::2], pads[1::2], strict=True)]
        sizes = zip(inputs.shape[-self.axes :], reversed(totals), strict=True)
        return torch.Size(
            (size + total - dilation * (kernel - 1) - 1) // stride + 1
            for (size, total), kernel, dilation, stride in zip(
                sizes, module.kernel_size, module.dilation, module.stride, strict=True
            )
        )


def _sample_size(maps: Tensor, rows: SampledRows) -> tuple[int, int]:
    """Numbers of images and of channels per group to draw of maps (images, groups, c, *size)."""
    images, _, channels, *size = maps.shape
    pixels = max(1, torch.Size(size).numel())
    budget = PIXELS_PER_ROW * rows.count(images) * max(1, images)
    taken = min(channels, max(1, budget // pixels))
    return min(images, max(1, budget // (pixels * taken))), taken


class Conv1dLayer(ConvLayer):
    """`nn.Conv1d`."""

    axes: ClassVar[int] = 1
    module_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d,)


class Conv3dLayer(ConvLayer):
    """`nn.Conv3d`."""

    axes: ClassVar[int] = 3
    module_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv3d,)


class Conv2dLayer(ConvLayer):
    """`nn.Conv2d`.

    `PatchMoment` computes the input moment for stride 1 and zero padding, without patches.
    """

    axes: ClassVar[int] = 2
    module_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d,)
    #: Least number of rows, and of channels, for which `PatchMoment` is faster than patches.
    few_rows, few_channels = 400, 8

    def input_moment(self, module: Any, inputs: Tensor) -> Tensor:
        """Sum of x'x over all rows x of one call (see the base class)."""
        inputs = self._add_batch_axis(inputs)
        size = self._output_size(module, inputs)
        count = len(inputs) * size.numel()
        if not self._uses_patch_moment(module, count):
            return super().input_moment(module, inputs)
        products = PatchMoment(*self._axes(module, inputs, size))
        image_bytes = self.working_dtype.itemsize * inputs[0].numel()
        images = max(1, int(min(self.capture_mb * 2**20 / max(1, image_bytes), len(inputs))))
        sums = inputs.new_zeros(self.blocks, self.columns - 1, dtype=self.working_dtype)
        for batch in inputs.split(images):
            batch = batch.to(self.working_dtype)
            products.add(batch.transpose(0, 1).unflatten(0, (self.blocks, -1)).transpose(2, 3))
            if self.bias is not None:
                view = self._patch_view(module, self._pad(module, batch), size)
                sums += view.sum((-3, -2, -1)).flatten(1)
        if self.bias is None:
            return products.result()
        moment = self.unwritten_moment()
        moment[:, :-1, :-1] = products.result()
        return self.with_border(moment, sums, count)

    def measure_flops(
        self, call: Call, kept: tuple[Tensor, ...], output: Tensor, statistic: Statistic
    ) -> float:
        """Approximate FLOPs of one call's statistic (see the base class)."""
        module: Any = call.module
        rows = self.sample_count(module, output) * self.position_count(module, output)
        if statistic != Statistic(INPUT, Moment()) or not self._uses_patch_moment(module, rows):
            return super().measure_flops(call, kept, output, statistic)
        high, wide = module.kernel_size
        shifts = ((2 * high - 1) * (2 * wide - 1) + 1) / 2
        channels = module.in_channels / self.blocks
        margin = 1 + module.dilation[1] * (wide - 1) / output.shape[-1]
        return 2 * self.blocks * channels**2 * rows * shifts * margin

    def _uses_patch_moment(self, module: Any, rows: int) -> bool:
        """True if `PatchMoment` computes the input moment."""
        sliding = tuple(module.kernel_size) != (1, 1) and tuple(module.stride) == (1, 1)
        enough = rows >= self.few_rows and module.in_channels >= self.few_channels * self.blocks
        return sliding and module.padding_mode == 'zeros' and enough

    def _axes(self, module: Any, inputs: Tensor, positions: torch.Size) -> Iterator[Axis]:
        left, _, top, _ = self._padding(module)
        for size, count, kernel, step, pad in zip(
            inputs.shape[2:],
            positions,
            module.kernel_size,
            module.dilation,
            (top, left),
            strict=True,
        ):
            yield Axis(size, count, tuple(place * step - pad for place in range(kernel)))


class ConvTranspose2dLayer(ConvLayer):
    """`nn.ConvTranspose2d`: every input position is one row.

    The roles of input and output are those of a convolution, exchanged. The input of a row is the
    vector of channels at its position (i). The gradient of a row is the patch (o, kernel) of the
    output's gradient that the position contributed to. G is therefore (blocks, o kernel, i). The
    bias belongs to pixels instead of patches, so it takes the plain rule.
    """

    axes: ClassVar[int] = 2
    module_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.ConvTranspose2d,)
    joins_bias: ClassVar[bool] = False

    @classmethod
    def refusal(cls, module: Any) -> str:
        sizes = zip(module.output_padding, module.stride, strict=True)
        past = any(padding >= stride for padding, stride in sizes)  # rows without an input
        return super().refusal(module) or ('its output_padding reaches its stride' if past else '')

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rows, self.columns = self.weight[0].numel(), self.weight.shape[0] // self.blocks

    def weight_matrix(self, weight: Tensor) -> Tensor:
        return weight.to(self.working_dtype).reshape(self.blocks, self.columns, -1).mT

    def split(self, matrix: Tensor) -> list[Tensor]:
        return [matrix.mT.reshape(self.weight.shape).to(self.weight.dtype)]

    def count_rows(self, call: Call, gradient: Tensor, statistics: Any) -> int:
        """Number of input positions of one call, or of samples if rows are reduced."""
        samples = self.sample_count(call.module, gradient)
        reduced = any(statistic.rows == REDUCED for statistic in statistics)
        return samples if reduced else samples * self.position_count(call.module, gradient)

    @property
    def kernel_positions(self) -> int:
        """1: an input row is the channels of one pixel."""
        return 1

    def input_rows(self, module: Any, inputs: Tensor) -> Iterator[Tensor]:
        yield super().gradient_rows(module, inputs.to(self.working_dtype))

    def input_power_sum(self, module: Any, inputs: Tensor, power: int) -> tuple[Tensor, int]:
        return Layer.input_power_sum(self, module, inputs, power)

    def reduced_input(self, module: Any, inputs: Tensor) -> Tensor:
        inputs = self._add_batch_axis(inputs).to(self.working_dtype)
        return self._maps_to_rows(inputs.flatten(2).mean(2, keepdim=True))

    def sampled_input(self, module: Any, inputs: Tensor, drawn: Tensor) -> Tensor:
        return super().sampled_gradient(module, inputs.to(self.working_dtype), drawn)

    def gradient_rows(self, module: Any, gradient: Tensor) -> Tensor:
        return self._extract_patches(module, gradient).flatten(1, 3).flatten(2)

    def reduced_gradient(self, module: Any, gradient: Tensor) -> Tensor:
        return self._extract_patches(module, gradient).sum((-2, -1)).flatten(1, 3)

    def sampled_gradient(self, module: Any, gradient: Tensor, drawn: Tensor) -> Tensor:
        return super().sampled_input(module, gradient, drawn)

    def position_sizes(self, module: Any, gradient: Tensor) -> Tensor:
        return Layer.position_sizes(self, module, gradient)

    def position_count(self, module: Any, gradient: Tensor) -> int:
        return self._output_size(module, self._add_batch_axis(gradient)).numel()
