"""Layers that can be preconditioned: their matrix form and the sums measured of them.

Conventions, here and everywhere: a layer's gradient is a stack of matrices G (blocks, o, i). A
linear layer or plain convolution is one block; a convolution with g groups is g independent
blocks. A convolution's i counts its patch (channels, kernel height, kernel width), as in
``weight.reshape(o, -1)``. With a joint bias the input rows carry a trailing 1 and the bias
gradient is the last column of G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True, eq=False)
class Call:
    """One forward call of a layer's module; holds none of its activations.

    Attributes:
        layer: The layer.
        module: The module that was called.
        extra: What else the layer needs to read the call.
    """

    layer: Layer
    module: nn.Module
    extra: Any = None


#: Takes a complete call, the tensors to keep, and the output whose gradient they wait for.
Observer = Callable[[Call, tuple[Tensor, ...], Tensor], None]


#: Suffix of statistics over samples: the mean input and the summed gradient of their positions.
REDUCED = '_reduced'


class Tap:
    """A hook that a deep copy or a pickle of the model takes along without its observer."""

    def __init__(self, observe: Callable[..., None] | None) -> None:
        self.observe = observe

    @_disable_dynamo  # a compiled model breaks its graph here on statistics steps
    def __call__(self, *event: Any) -> None:
        if self.observe is not None:
            self.observe(*event)

    def __reduce__(self) -> tuple[type, tuple[None]]:
        return Tap, (None,)


class Layer:
    """One weight (and its bias) that is preconditioned, with the modules that use it.

    Attributes:
        name: The weight's parameter name in the model.
        weight: The weight.
        bias: The bias, when it is preconditioned jointly with the weight, else None.
        modules: The modules that own the weight (more than one where modules share parameters).
        blocks: Independent blocks of the layer.
        rows: o, output features of one block.
        columns: i, input features of one block, the trailing 1 of a joint bias included.
        working_dtype: Dtype of all statistics: the weight's own, at least float32.
        damping: This layer's damping in place of its preconditioner's, or None.
    """

    def __init__(self, name: str, modules: list[nn.Module], weight: nn.Parameter,
                 bias: nn.Parameter | None, *, capture_mb: float = 64.,
                 damping: float | None = None) -> None:
        self.name = name
        self.modules = modules
        self.weight = weight
        self.bias = bias
        self.capture_mb = capture_mb
        self.damping = damping
        self.blocks = self._blocks(modules[0])
        self.rows = weight.shape[0] // self.blocks
        self.columns = weight[0].numel() + (bias is not None)
        self.working_dtype = torch.promote_types(weight.dtype, torch.float32)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(blocks, o, i) of the gradient's matrix form."""
        return self.blocks, self.rows, self.columns

    def statistic_shape(self, statistic: str) -> tuple[int, int, int]:
        """(blocks, n, n) of a statistic: n is i for the input's, o for the gradient's."""
        side = self.columns if statistic.startswith('input') else self.rows
        return self.blocks, side, side

    def empty(self, statistic: str) -> Tensor:
        """Zeros in the shape of a statistic."""
        return self.weight.new_zeros(self.statistic_shape(statistic), dtype=self.working_dtype)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias where it is joint."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def join(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Puts weight- and bias-shaped tensors into the matrix form (blocks, o, i)."""
        matrix = weight.to(self.working_dtype).reshape(self.blocks, self.rows, -1)
        if self.bias is None:
            return matrix
        column = (matrix.new_zeros(self.blocks, self.rows, 1) if bias is None
                  else bias.to(self.working_dtype).reshape(self.blocks, self.rows, 1))
        return torch.cat([matrix, column], dim=2)

    def split(self, matrix: Tensor) -> list[Tensor]:
        """The inverse of `join`: tensors shaped and typed like `parameters`."""
        width = self.columns - (self.bias is not None)
        pieces = [matrix[..., :width].reshape(self.weight.shape).to(self.weight.dtype)]
        if self.bias is not None:
            pieces.append(matrix[..., width].reshape(self.bias.shape).to(self.bias.dtype))
        return pieces

    def watch(self, observe: Observer,
              complain: Callable[[Layer, str], None]) -> list[RemovableHandle]:
        """Installs hooks that report each complete forward call.

        Args:
            observe: Takes the calls.
            complain: Takes reasons why a call could not be read.

        Returns:
            Handles that remove the hooks.
        """
        def report(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
                   output: Tensor) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            observe(Call(self, module), (inputs,), output)

        # First, before a user's hook that may replace the output.
        return [module.register_forward_hook(Tap(report), with_kwargs=True, prepend=True)
                for module in self.modules]

    def count_rows(self, call: Call, gradient: Tensor, statistics: tuple[str, ...]) -> int:
        """Rows of one call, by which its input statistics are averaged."""
        if any(name.endswith(REDUCED) for name in statistics):
            return self._samples(gradient)
        return gradient.numel() // max(1, self.blocks * self.rows)

    def measure(self, call: Call, kept: tuple[Tensor, ...], gradient: Tensor,
                statistics: tuple[str, ...], generator: torch.Generator) -> dict[str, Tensor]:
        """Sums of one call.

        Args:
            call: The call.
            kept: The tensors kept of it.
            gradient: Gradient of the loss by the call's output.
            statistics: Names of the statistics wanted.
            generator: For layers that sample.

        Returns:
            By name: tensors shaped as `statistic_shape`, in `working_dtype`.
        """
        return {name: self._measure_one(name, call.module, kept[0], gradient)
                for name in statistics}

    def _measure_one(self, name: str, module: nn.Module, inputs: Tensor,
                     gradient: Tensor) -> Tensor:
        if name == 'input_moment':
            return self.input_moment(module, inputs)
        if name == 'gradient_moment':
            return self.gradient_moment(gradient)
        if name == 'input_moment' + REDUCED:
            return _gram(self._with_ones(self._reduced_input(module, inputs)))
        if name == 'gradient_moment' + REDUCED:
            return _gram(self._reduced_gradient(gradient.to(self.working_dtype)))
        raise ValueError(f'{type(self).__name__} has no statistic {name!r}')

    def _with_ones(self, rows: Tensor) -> Tensor:
        """Rows (blocks, i, n) with the trailing 1 of a joint bias."""
        if self.bias is None:
            return rows
        return torch.cat([rows, rows.new_ones(self.blocks, 1, rows.shape[2])], 1)

    def input_moment(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Sum of x'x over all rows x of one call.

        Args:
            module: The module that was called.
            inputs: Its input, any dtype.

        Returns:
            (blocks, i, i) in `working_dtype`.
        """
        moment = self.empty('input_moment')
        width = self.columns - (self.bias is not None)
        count = 0
        for rows in self._input_rows(module, inputs):
            moment[:, :width, :width].baddbmm_(rows, rows.transpose(1, 2))
            if self.bias is not None:
                moment[:, :width, width] += rows.sum(2)
            count += rows.shape[2]
        if self.bias is not None:
            moment[:, width, :width] = moment[:, :width, width]
            moment[:, width, width] = count
        return moment

    def gradient_moment(self, gradient: Tensor) -> Tensor:
        """Sum of g'g over all rows g of an output gradient: (blocks, o, o)."""
        return _gram(self._gradient_rows(gradient.to(self.working_dtype)))

    def _blocks(self, module: nn.Module) -> int:
        return 1

    def _input_rows(self, module: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
        """Chunks (blocks, i without bias, rows) of the input rows."""
        raise TypeError(f'{type(self).__name__} must say what its input rows are')

    def _gradient_rows(self, gradient: Tensor) -> Tensor:
        """(blocks, o, rows) of an output gradient."""
        raise TypeError(f'{type(self).__name__} must say what its gradient rows are')

    def _reduced_input(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Mean input row of each sample (blocks, i without bias, samples)."""
        raise TypeError(f'{type(self).__name__} must say what the rows of a sample are')

    def _reduced_gradient(self, gradient: Tensor) -> Tensor:
        """Sum of the gradient rows of each sample (blocks, o, samples)."""
        raise TypeError(f'{type(self).__name__} must say what the rows of a sample are')

    def _samples(self, gradient: Tensor) -> int:
        """Number of samples."""
        raise TypeError(f'{type(self).__name__} must say what the rows of a sample are')


class LinearLayer(Layer):
    """`nn.Linear`; all leading dimensions of its input are rows."""

    def _input_rows(self, module: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
        yield inputs.to(self.working_dtype).reshape(-1, inputs.shape[-1]).t()[None]

    def _gradient_rows(self, gradient: Tensor) -> Tensor:
        return gradient.reshape(-1, gradient.shape[-1]).t()[None]

    def _reduced_input(self, module: nn.Module, inputs: Tensor) -> Tensor:
        return _by_sample(inputs.to(self.working_dtype)).mean(1).t()[None]

    def _reduced_gradient(self, gradient: Tensor) -> Tensor:
        return _by_sample(gradient).sum(1).t()[None]

    def _samples(self, gradient: Tensor) -> int:
        return len(_by_sample(gradient))


class Conv2dLayer(Layer):
    """`nn.Conv2d` with any stride, padding, padding mode, dilation and groups.

    Every output position is one row. Patches are laid out in chunks of at most `capture_mb`
    megabytes (at least one output row of one image), never for a whole feature map.
    """

    def _blocks(self, module: Any) -> int:
        return module.groups

    def _input_rows(self, module: Any, inputs: Tensor) -> Iterator[Tensor]:
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

    def _gradient_rows(self, gradient: Tensor) -> Tensor:
        if gradient.dim() == 3:
            gradient = gradient[None]
        positions = gradient.shape[2:].numel()
        rows = gradient.reshape(gradient.shape[0], self.blocks, self.rows, positions)
        return rows.permute(1, 2, 0, 3).flatten(2)

    def _reduced_input(self, module: Any, inputs: Tensor) -> Tensor:
        inputs = inputs if inputs.dim() == 4 else inputs[None]
        height, width = self._output_size(module, inputs)
        padded = self._padded(module, inputs.to(self.working_dtype))
        patches = self._patch_view(module, padded, 0, height, width)
        return patches.mean((-2, -1)).flatten(1, 3)

    def _reduced_gradient(self, gradient: Tensor) -> Tensor:
        gradient = gradient if gradient.dim() == 4 else gradient[None]
        return gradient.sum((2, 3)).t().reshape(self.blocks, self.rows, len(gradient))

    def _samples(self, gradient: Tensor) -> int:
        return len(gradient) if gradient.dim() == 4 else 1

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


def _gram(rows: Tensor) -> Tensor:
    """Sum of outer products of rows (blocks, n, rows): (blocks, n, n)."""
    return rows @ rows.mT


def _by_sample(tensor: Tensor) -> Tensor:
    """(samples, positions, features) of what a linear layer takes or gives."""
    if tensor.dim() <= 2:
        return tensor.reshape(-1, 1, tensor.shape[-1])
    tensor = tensor.flatten(1, -2)
    return tensor if tensor.shape[1] else tensor[:0]


#: Supported module classes, by exact type (a subclass may compute something else). Those of
#: packages that are not imported here go by qualified name; mmcv's differ from torch's on empty
#: inputs and old versions only.
LAYER_TYPES: dict[type[nn.Module] | str, type[Layer]] = {
    nn.Linear: LinearLayer,
    nn.Conv2d: Conv2dLayer,
    'mmcv.cnn.bricks.wrappers.Linear': LinearLayer,
    'mmcv.cnn.bricks.wrappers.Conv2d': Conv2dLayer,
}


def qualified_name(kind: type) -> str:
    """Module and name of a class."""
    return f'{kind.__module__}.{kind.__qualname__}'


def layer_type(module: nn.Module) -> type[Layer] | None:
    """The kind of layer that a module is, or None."""
    kind = type(module)
    return LAYER_TYPES.get(kind) or LAYER_TYPES.get(qualified_name(kind))
