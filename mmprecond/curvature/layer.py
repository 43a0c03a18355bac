"""Layers that can be preconditioned: their matrix form and the sums measured of them.

Conventions, here and everywhere: a layer's gradient is a stack of matrices G (blocks, o, i). A
linear layer or plain convolution is one block; a convolution with g groups is g independent
blocks. A convolution's i counts its patch (channels, kernel height, kernel width), as in
``weight.reshape(o, -1)``. With a joint bias the input rows carry a trailing 1 and the bias
gradient is the last column of G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..linalg import Shape
from .calls import Call, Observer, Tap
from .gram import gram
from .moments import Blocks
from .rows import LayerRows
from .statistic import (
    ALL,
    GRADIENT,
    INPUT,
    REDUCED,
    AllRows,
    ReducedRows,
    Rows,
    SampledRows,
    Side,
    Statistic,
)


class Layer:
    """One weight (and its bias) that is preconditioned, with the modules that use it.

    A subclass says what its rows are: `input_rows` and `gradient_rows`; and, where `row_kinds` has
    more than all rows, the methods about samples.

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

    #: Module classes whose forward pass it describes; none means any.
    module_types: ClassVar[tuple[type[nn.Module], ...]] = ()
    #: Which rows its statistics may be over.
    row_kinds: ClassVar[tuple[type[Rows], ...]] = (AllRows,)
    #: Whether a bias may be a column of the weight's matrix.
    joins_bias: ClassVar[bool] = True
    #: Whether its statistics are differences that a lower precision would ruin.
    needs_full_precision: ClassVar[bool] = False

    def __init__(
        self,
        name: str,
        modules: list[nn.Module],
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        capture_mb: float = 64.0,
        damping: float | None = None,
    ) -> None:
        self.name = name
        self.modules = modules
        self.weight = weight
        self.bias = bias
        self.capture_mb = capture_mb
        self.damping = damping
        self.blocks = self.count_blocks(modules[0])
        self.rows = weight.shape[0] // self.blocks
        self.columns = weight[0].numel() + (bias is not None)
        self.working_dtype = torch.promote_types(weight.dtype, torch.float32)

    # ---------------------------------------------------------------- what it can give

    @classmethod
    def type_refusal(cls, kind: type[nn.Module]) -> str:
        """Reason why modules of a class cannot be read, or ''."""
        if cls.module_types and not issubclass(kind, cls.module_types):
            names = ' or '.join(known.__name__ for known in cls.module_types)
            return f'{kind.__name__} is no {names}, whose forward pass {cls.__name__} reads'
        return ''

    @classmethod
    def refusal(cls, module: nn.Module) -> str:
        """Reason why one module cannot be read, or ''."""
        return cls.type_refusal(type(module))

    @classmethod
    def missing_methods(cls) -> list[str]:
        """Names of the methods that a complete subclass defines and this one does not."""
        needed = ['input_rows', 'gradient_rows']
        if ReducedRows in cls.row_kinds:
            needed += ['reduced_input', 'reduced_gradient', 'sample_count']
        if SampledRows in cls.row_kinds:
            needed += ['sampled_input', 'sampled_gradient', 'position_count']
        return [name for name in needed if getattr(cls, name) is getattr(Layer, name)]

    @classmethod
    def count_blocks(cls, module: nn.Module) -> int:
        """Number of independent blocks of a module's weight."""
        return 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(blocks, o, i) of the gradient's matrix form."""
        return self.blocks, self.rows, self.columns

    @property
    def compressible(self) -> bool:
        """True if other forms may stand for its moments: not of groups, whose own are small."""
        return self.blocks == 1

    def has_side(self, side: Side) -> bool:
        """True if the layer has such rows."""
        return side in (INPUT, GRADIENT)

    def size_of(self, side: Side) -> tuple[int, int]:
        """Blocks and length of a side: i of the input's, o of the gradient's."""
        return self.blocks, self.rows if side.of_gradient else self.columns

    def shapes(self, statistic: Statistic) -> dict[str, Shape]:
        """Shapes (b, n, m) of a statistic's tensors by name."""
        return statistic.shapes(*self.size_of(statistic.side))

    def lacks(self, statistic: Statistic) -> str:
        """Reason why it cannot give a statistic, or ''."""
        kind = type(self).__name__
        if not self.has_side(statistic.side):
            return f'{kind} has no side {statistic.side.name!r}'
        rows, form = type(statistic.rows).__name__, type(statistic.form).__name__
        if not isinstance(statistic.rows, self.row_kinds):
            return f'{kind} cannot take {rows} of a call'
        if not statistic.form.is_product and statistic.rows != ALL:
            return f'{form} is taken of all rows, not of {rows}'
        if statistic.form.is_special:
            return f'{form} is not a form of {statistic.side.name}'
        if isinstance(statistic.form, Blocks) and not self.compressible:
            return f'{form} is for layers of one block'
        return ''

    def empty(self, statistic: Statistic) -> dict[str, Tensor]:
        """Zeros in the shapes of a statistic's tensors."""
        return {
            key: self.weight.new_zeros(shape, dtype=self.working_dtype)
            for key, shape in self.shapes(statistic).items()
        }

    def seed_of(self, key: str) -> int:
        """A seed for what is drawn once for this layer and a statistic."""
        return crc32(f'{self.name} {key}'.encode())

    # ---------------------------------------------------------------- its matrix form

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias where it is joint."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def join(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Puts weight- and bias-shaped tensors into the matrix form (blocks, o, i)."""
        matrix = weight.to(self.working_dtype).reshape(self.blocks, self.rows, -1)
        if self.bias is None:
            return matrix
        column = (
            matrix.new_zeros(self.blocks, self.rows, 1)
            if bias is None
            else bias.to(self.working_dtype).reshape(self.blocks, self.rows, 1)
        )
        return torch.cat([matrix, column], dim=2)

    def split(self, matrix: Tensor) -> list[Tensor]:
        """The inverse of `join`: tensors shaped and typed like `parameters`."""
        width = self.columns - (self.bias is not None)
        pieces = [matrix[..., :width].reshape(self.weight.shape).to(self.weight.dtype)]
        if self.bias is not None:
            pieces.append(matrix[..., width].reshape(self.bias.shape).to(self.bias.dtype))
        return pieces

    # ---------------------------------------------------------------- measuring

    def watch(
        self, observe: Observer, complain: Callable[[Layer, str], None]
    ) -> list[RemovableHandle]:
        """Installs hooks that report each complete forward call.

        Args:
            observe: Takes the calls.
            complain: Takes reasons why a call could not be read.

        Returns:
            Handles that remove the hooks.
        """

        def report(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            observe(Call(self, module), (inputs,), output)

        # First, before a user's hook that may replace the output.
        return [
            module.register_forward_hook(Tap(report), with_kwargs=True, prepend=True)
            for module in self.modules
        ]

    def count_rows(self, call: Call, gradient: Tensor, statistics: Sequence[Statistic]) -> int:
        """Rows of one call, by which its input statistics are averaged."""
        if any(statistic.rows == REDUCED for statistic in statistics):
            return self.sample_count(call.module, gradient)
        return gradient.numel() // max(1, self.blocks * self.rows)

    def measure(
        self,
        call: Call,
        kept: tuple[Tensor, ...],
        gradient: Tensor,
        statistics: Sequence[Statistic],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Sums of one call.

        Args:
            call: The call.
            kept: The tensors kept of it.
            gradient: Gradient of the loss by the call's output.
            statistics: The statistics to measure.
            generator: For layers that sample.

        Returns:
            By tensor name, in `working_dtype`: as the statistics' forms measure them.
        """
        drawn = torch.arange(0, device='cpu')
        sampled = [s.rows for s in statistics if isinstance(s.rows, SampledRows)]
        if sampled:  # the same for both sides
            drawn = torch.randperm(
                self.position_count(call.module, gradient), generator=generator, device='cpu'
            )
            samples = self.sample_count(call.module, gradient)
            drawn = drawn[: sampled[0].count(samples)].to(gradient.device)
        sums: dict[str, Tensor] = {}
        for statistic in statistics:
            rows = LayerRows(self, call.module, kept[0], gradient, statistic, drawn)
            sums.update(zip(statistic.keys, statistic.form.measure(rows), strict=True))
        return sums

    def measure_flops(
        self, call: Call, kept: tuple[Tensor, ...], output: Tensor, statistic: Statistic
    ) -> float:
        """About the floating-point operations by which `measure` makes a statistic of one call.

        Args:
            call: The call.
            kept: The tensors that `measure` would take of it.
            output: Its output, of which the shape is read.
            statistic: The statistic.
        """
        if not statistic.form.is_product:  # one pass, over images rather than patches
            return float((output if statistic.side.of_gradient else kept[0]).numel())
        rows = self.count_rows(call, output, (statistic,))
        if isinstance(statistic.rows, SampledRows):
            samples = self.sample_count(call.module, output)
            rows = min(rows, samples * statistic.rows.count(samples))
        return sum(
            statistic.form.measure_flops(rows, *shape) for shape in self.shapes(statistic).values()
        )

    def input_moment(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Sum of x'x over all rows x of one call.

        Args:
            module: The module that was called.
            inputs: Its input, any dtype.

        Returns:
            (blocks, i, i) in `working_dtype`.
        """
        moment = self.unwritten_moment()
        width = self.columns - (self.bias is not None)
        sums, count = moment.new_zeros(self.blocks, width), 0

        def counted() -> Iterator[Tensor]:
            nonlocal count
            for rows in self.input_rows(module, inputs):
                if self.bias is not None:
                    sums.add_(rows.sum(2))
                count += rows.shape[2]
                yield rows

        gram(counted(), moment[:, :width, :width])
        return self.with_border(moment, sums, count)

    def unwritten_moment(self) -> Tensor:
        """A tensor (blocks, i, i) to write the input's moment to, not initialised."""
        return self.weight.new_empty(
            (self.blocks, self.columns, self.columns), dtype=self.working_dtype
        )

    def with_border(self, moment: Tensor, sums: Tensor, count: int) -> Tensor:
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

    def with_ones(self, rows: Tensor) -> Tensor:
        """Rows (blocks, i, n) with the trailing 1 of a joint bias."""
        if self.bias is None:
            return rows
        return torch.cat([rows, rows.new_ones(self.blocks, 1, rows.shape[2])], 1)

    def input_power_sum(self, module: nn.Module, inputs: Tensor, power: int) -> tuple[Tensor, int]:
        """Sum of the input rows to a power (blocks, i without bias, 1), and their number."""
        width = self.columns - (self.bias is not None)
        total = self.weight.new_zeros(self.blocks, width, 1, dtype=self.working_dtype)
        count = 0
        for rows in self.input_rows(module, inputs):
            total += rows.pow(power).sum(2, keepdim=True)
            count += rows.shape[2]
        return total, count

    # ---------------------------------------------------------------- what a subclass says

    def input_rows(self, module: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
        """Chunks (blocks, i without bias, rows) of the input rows, in `working_dtype`."""
        raise TypeError(f'{type(self).__name__} must say what its input rows are')

    def gradient_rows(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """(blocks, o, rows) of an output gradient."""
        raise TypeError(f'{type(self).__name__} must say what its gradient rows are')

    def reduced_input(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Mean input row of each sample (blocks, i without bias, samples)."""
        raise TypeError(f'{type(self).__name__} must say what the rows of a sample are')

    def reduced_gradient(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """Sum of the gradient rows of each sample (blocks, o, samples)."""
        raise TypeError(f'{type(self).__name__} must say what the rows of a sample are')

    def sample_count(self, module: nn.Module, gradient: Tensor) -> int:
        """Number of samples."""
        raise TypeError(f'{type(self).__name__} must say what the rows of a sample are')

    def position_count(self, module: nn.Module, gradient: Tensor) -> int:
        """Number of positions a sample."""
        raise TypeError(f'{type(self).__name__} must say what the rows of a sample are')

    def sampled_input(self, module: nn.Module, inputs: Tensor, drawn: Tensor) -> Tensor:
        """Input rows at the drawn positions of each sample (blocks, i without bias, rows)."""
        raise TypeError(f'{type(self).__name__} must say what the rows of a sample are')

    def sampled_gradient(self, module: nn.Module, gradient: Tensor, drawn: Tensor) -> Tensor:
        """Gradient rows at the drawn positions of each sample (blocks, o, rows)."""
        raise TypeError(f'{type(self).__name__} must say what the rows of a sample are')


#: Rows of layers that tell samples and positions apart.
EVERY_ROW_KIND: tuple[type[Rows], ...] = (AllRows, ReducedRows, SampledRows)
