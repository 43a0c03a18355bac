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
from zlib import crc32

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

from ..linalg import add_product, stacked_product
from .gram import gram, gram_flops


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
#: Suffix of statistics over some positions of each sample, drawn at random, scaled to all.
SAMPLED = '_sampled'
#: The second moment of a side's rows, and the forms that stand for it where it is too large: its
#: diagonal blocks; its product with a random test matrix; rows themselves, as columns.
MOMENT, BLOCKS, SKETCH, COLUMNS = '_moment', '_blocks', '_sketch', '_columns'
#: Test matrices of a sketch: normal numbers, or columns of the identity.
SKETCH_KINDS = ('gaussian', 'columns')
#: Vectors of a side: the sum of its rows, and of their squares (the moment's diagonal).
MEAN, SQUARE = '_mean', '_square'


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
        positions: Positions of each sample that `SAMPLED` statistics draw at a call.
        max_rows: In place of `positions`, the rows that they draw of all samples; or None.
        slots: Width of `COLUMNS` statistics.
        rank: Width of `SKETCH` statistics.
        sketch: Kind of their test matrix, one of `SKETCH_KINDS`.
        block: Largest block of `BLOCKS` statistics.
        offset: Steps by which its captures and refreshes come later than others'.
        cancels: Whether its statistics are differences of nearly equal numbers, which no lower
            precision of products may touch.
    """

    positions = 8
    max_rows: int | None = None
    slots = 256
    rank = 256
    sketch = 'gaussian'
    block = 8192
    offset = 0
    cancels = False

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

    @property
    def has_positions(self) -> bool:
        """Whether rows of its statistics can be drawn."""
        return True

    @property
    def compressible(self) -> bool:
        """Whether its moments have the other forms; those of grouped convolutions are small."""
        return self.blocks == 1

    def side(self, statistic: str) -> int:
        """Length of a statistic's side: i of the input's, o of the gradient's."""
        return self.columns if statistic.startswith('input') else self.rows

    def statistic_shape(self, statistic: str) -> tuple[int, int, int]:
        """(blocks, n, n) of a moment; (blocks, n, slots) or (blocks, n, rank) of its stand-ins.

        (blocks, n, 1) of a vector.
        """
        side = self.side(statistic)
        if statistic.endswith((MEAN, SQUARE)):
            return self.blocks, side, 1
        if COLUMNS in statistic:
            return self.blocks, side, self.slots
        if SKETCH in statistic:
            return self.blocks, side, min(self.rank, side)
        if BLOCKS in statistic:
            count = -(-side // self.block)
            size = -(-side // count)
            return count, size, size
        return self.blocks, side, side

    def test_matrix(self, statistic: str) -> Tensor:
        """The test matrix of a sketch (1, n, rank): normal entries of variance 1 / rank.

        Or, of the kind 'columns', as many different columns of the identity. Drawn from the
        layer's name, it is the same at all steps, on all ranks and devices.
        """
        _, side, rank = self.statistic_shape(statistic)
        generator = torch.Generator().manual_seed(crc32(f'{self.name} {statistic}'.encode()))
        if self.sketch == 'columns':
            chosen = torch.randperm(side, generator=generator, device='cpu')[:rank]
            drawn = torch.zeros(1, side, rank, device='cpu')
            drawn[0, chosen, torch.arange(rank, device='cpu')] = 1
        else:
            drawn = torch.randn(1, side, rank, generator=generator, dtype=torch.float32,
                                device='cpu') / rank**0.5
        return drawn.to(self.weight.device, self.working_dtype)

    def empty(self, statistic: str) -> Tensor:
        """Zeros in the shape of a statistic."""
        return self._unwritten(statistic).zero_()

    def _unwritten(self, statistic: str) -> Tensor:
        return self.weight.new_empty(self.statistic_shape(statistic), dtype=self.working_dtype)

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
            By name, in `working_dtype`: tensors shaped as `statistic_shape`, of `COLUMNS` as many
            columns as there are.
        """
        drawn = torch.arange(0, device='cpu')
        if any(name.endswith(SAMPLED) for name in statistics):  # the same for both sides
            drawn = torch.randperm(self._position_count(gradient), generator=generator,
                                   device='cpu')
            drawn = drawn[:self._positions_drawn(gradient)].to(gradient.device)
        return {name: self._measure_one(name, call.module, kept[0], gradient, drawn)
                for name in statistics}

    def finished(self, name: str, statistic: Tensor) -> Tensor:
        """A running statistic (..., b, n, m) in the form that a refresh takes."""
        return statistic

    def measure_flops(self, call: Call, kept: tuple[Tensor, ...], output: Tensor,
                      name: str) -> float:
        """About the floating-point operations by which `measure` makes a statistic of one call.

        Args:
            call: The call.
            kept: The tensors that `measure` would take of it.
            output: Its output, of which the shape is read.
            name: The statistic.
        """
        rows = self.count_rows(call, output, (name,))
        if name.endswith(SAMPLED):
            rows = min(rows, self._samples(output) * self._positions_drawn(output))
        blocks, size, width = self.statistic_shape(name)
        if COLUMNS in name:
            return 0.
        if name.endswith((MEAN, SQUARE)):
            return float(output.numel() if name.startswith('gradient') else kept[0].numel())
        if SKETCH in name:
            return 4. * blocks * size * width * rows
        return blocks * gram_flops(size, rows)

    def _positions_drawn(self, gradient: Tensor) -> int:
        """How many positions `SAMPLED` statistics draw of each sample."""
        if self.max_rows is None:
            return self.positions
        return max(1, self.max_rows // max(1, self._samples(gradient)))

    def _measure_one(self, name: str, module: nn.Module, inputs: Tensor, gradient: Tensor,
                     drawn: Tensor) -> Tensor:
        if name == 'input' + MOMENT:
            return self.input_moment(module, inputs)
        if name.endswith((MEAN, SQUARE)):
            return self._vector(name, module, inputs, gradient)
        if COLUMNS in name:
            return torch.cat(list(self._rows(name, module, inputs, gradient, drawn)), 2)
        chunks = self._rows(name, module, inputs, gradient, drawn)
        if SKETCH in name:
            total, test = self.empty(name), self.test_matrix(name)
            for rows in chunks:
                add_product(total, rows, stacked_product(rows.mT, test))
            return total
        total = self._unwritten(name)
        if BLOCKS in name:
            chunks = (_in_blocks(rows, total) for rows in chunks)
        return gram(chunks, total)

    def _vector(self, name: str, module: nn.Module, inputs: Tensor, gradient: Tensor) -> Tensor:
        """Sum of a side's rows, or of their squares (blocks, n, 1)."""
        power = 2 if name.endswith(SQUARE) else 1
        if name.startswith('gradient'):
            rows = self._gradient_rows(gradient.to(self.working_dtype))
            return rows.pow(power).sum(2, keepdim=True)
        sums, count = self._input_sum(module, inputs, power)
        if self.bias is not None:
            sums = torch.cat([sums, sums.new_full((self.blocks, 1, 1), count)], 1)
        return sums

    def _input_sum(self, module: nn.Module, inputs: Tensor, power: int) -> tuple[Tensor, int]:
        """Sum of the input rows to a power (blocks, i without bias, 1), and their number."""
        width = self.columns - (self.bias is not None)
        total = self.weight.new_zeros(self.blocks, width, 1, dtype=self.working_dtype)
        count = 0
        for rows in self._input_rows(module, inputs):
            total += rows.pow(power).sum(2, keepdim=True)
            count += rows.shape[2]
        return total, count

    def _rows(self, name: str, module: nn.Module, inputs: Tensor, gradient: Tensor,
              drawn: Tensor) -> Iterator[Tensor]:
        """Chunks (blocks, n, rows) of the rows that a statistic is over."""
        scale = (self._position_count(gradient) / max(1, len(drawn)))**0.5
        if name.startswith('input'):
            if name.endswith(REDUCED):
                yield self._with_ones(self._reduced_input(module, inputs))
            elif name.endswith(SAMPLED):
                yield self._with_ones(self._sampled_input(module, inputs, drawn)) * scale
            else:
                yield from map(self._with_ones, self._input_rows(module, inputs))
            return
        gradient = gradient.to(self.working_dtype)
        if name.endswith(REDUCED):
            yield self._reduced_gradient(gradient)
        elif name.endswith(SAMPLED):
            yield self._sampled_gradient(gradient, drawn) * scale
        else:
            yield self._gradient_rows(gradient)

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
        moment = self._unwritten('input' + MOMENT)
        width = self.columns - (self.bias is not None)
        sums, count = moment.new_zeros(self.blocks, width), 0

        def counted() -> Iterator[Tensor]:
            nonlocal count
            for rows in self._input_rows(module, inputs):
                if self.bias is not None:
                    sums.add_(rows.sum(2))
                count += rows.shape[2]
                yield rows

        gram(counted(), moment[:, :width, :width])
        return self._bordered(moment, sums, count)

    def _bordered(self, moment: Tensor, sums: Tensor, count: int) -> Tensor:
        """A moment whose last row and column are filled in for the 1 of a joint bias.

        Args:
            moment: (blocks, i, i), changed in place.
            sums: Of the rows without the 1 (blocks, i - 1).
            count: Number of rows.
        """
        if self.bias is not None:
            moment[:, -1, :-1] = moment[:, :-1, -1] = sums
            moment[:, -1, -1] = count
        return moment

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

    def _position_count(self, gradient: Tensor) -> int:
        """Number of positions a sample."""
        raise TypeError(f'{type(self).__name__} must say what the rows of a sample are')

    def _sampled_input(self, module: nn.Module, inputs: Tensor, drawn: Tensor) -> Tensor:
        """Input rows at the drawn positions of each sample (blocks, i without bias, rows)."""
        raise TypeError(f'{type(self).__name__} must say what the rows of a sample are')

    def _sampled_gradient(self, gradient: Tensor, drawn: Tensor) -> Tensor:
        """Gradient rows at the drawn positions of each sample (blocks, o, rows)."""
        raise TypeError(f'{type(self).__name__} must say what the rows of a sample are')


def _in_blocks(rows: Tensor, like: Tensor) -> Tensor:
    """Rows (1, n, r) cut into the blocks of `like`, the last filled up with zeros."""
    count, size, _ = like.shape
    padded = nn.functional.pad(rows, (0, 0, 0, count * size - rows.shape[1]))
    return padded.reshape(count, size, rows.shape[2])
