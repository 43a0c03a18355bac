"""Layers that can be preconditioned: their matrix form and the sums over their rows.

Conventions of the package: a layer's gradient is a stack of matrices G (blocks, o, i). A linear
layer or plain convolution has one block. A convolution with g groups has g independent blocks. The
dimension i of a convolution is the size of its patch (channels, kernel height, kernel width), as in
``weight.reshape(o, -1)``. With a joint bias the input rows have a trailing 1, and the gradient of
the bias is the last column of G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..linalg import Shape, at_least_float32
from .calls import Call, Observer, Tap
from .drawing import Drawing
from .gram import gram
from .moments import Blocks
from .patch_form import PatchForm
from .rows import LayerRows
from .statistic import (
    ALL,
    GRADIENT,
    INPUT,
    REDUCED,
    AllRows,
    MatrixRows,
    ReducedRows,
    Rows,
    SampledRows,
    Side,
    Statistic,
)


class Layer:
    """One preconditioned weight (and its bias), with the modules that use it.

    A subclass defines its rows by `input_rows` and `gradient_rows`. If its `row_kinds` has more
    entries than `AllRows`, it also defines the methods about samples.

    Attributes:
        name: The weight's parameter name in the model.
        weight: The weight.
        bias: The bias if it is preconditioned jointly with the weight, else None.
        modules: Modules that own the weight (several if modules share parameters).
        blocks: Number of independent blocks.
        rows: o, output features of one block.
        columns: i, input features of one block, including the trailing 1 of a joint bias.
    """

    #: Module classes whose forward pass the layer describes; an empty tuple means any.
    module_types: ClassVar[tuple[type[nn.Module], ...]] = ()
    #: Selections of rows that statistics of the layer may use.
    row_kinds: ClassVar[tuple[type[Rows], ...]] = (AllRows,)
    #: Whether a bias may be a column of the weight's matrix.
    joins_bias: ClassVar[bool] = True
    #: Whether statistics are differences that lose all accuracy at a lower precision.
    needs_full_precision: ClassVar[bool] = False

    def __init__(
        self,
        name: str,
        modules: list[nn.Module],
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        capture_mb: float = 64.0,
    ) -> None:
        self.name = name
        self.modules = modules
        self.weight = weight
        self.bias = bias
        self.capture_mb = capture_mb
        self.blocks = self.count_blocks(modules[0])
        self.rows = weight.shape[0] // self.blocks
        self.columns = weight[0].numel() + (bias is not None)

    @property
    def working_dtype(self) -> torch.dtype:
        """Dtype of all statistics: the dtype of the weight, but at least float32."""
        return at_least_float32(self.weight.dtype)

    @property
    def is_replaced(self) -> bool:
        """True if no module uses the weight any more, as after `load_state_dict(assign=True)`."""
        held = {id(p) for module in self.modules for p in module.parameters()}
        return id(self.weight) not in held

    # ---------------------------------------------------------------- types, sides and statistics

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
        """Names of the methods that this class lacks."""
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
    def kernel_positions(self) -> int:
        """Number of entries of a channel in an input row; 1 if rows are no patches."""
        return 1

    @property
    def compressible(self) -> bool:
        """True if compressed forms may replace the moments; moments of groups are small anyway."""
        return self.blocks == 1

    def has_side(self, side: Side) -> bool:
        """True if the layer has such rows."""
        return side in (INPUT, GRADIENT)

    def size_of(self, side: Side) -> tuple[int, int]:
        """Blocks and length of a side: i for the input, o for the gradient."""
        return self.blocks, self.rows if side.of_gradient else self.columns

    def shapes(self, statistic: Statistic) -> dict[str, Shape]:
        """Shapes (b, n, m) of a statistic's tensors by name."""
        return statistic.shapes(*self.size_of(statistic.side))

    def lacks(self, statistic: Statistic) -> str:
        """Reason why the layer cannot measure a statistic, or ''."""
        kind = type(self).__name__
        if not self.has_side(statistic.side):
            return f'{kind} has no side {statistic.side.name!r}'
        rows, form = type(statistic.rows).__name__, type(statistic.form).__name__
        if not isinstance(statistic.rows, (MatrixRows, *self.row_kinds)):
            return f'{kind} cannot take {rows} of a call'
        if not statistic.form.is_product and statistic.rows != ALL:
            return f'{form} is taken of all rows, not of {rows}'
        if statistic.form.is_special:
            return f'{form} is not a form of {statistic.side.name}'
        if isinstance(statistic.form, Blocks) and not self.compressible:
            return f'{form} is for layers of one block'
        if isinstance(statistic.form, PatchForm) and (
            statistic.side.of_gradient or statistic.form != statistic.form.of(self)
        ):
            return f'{form} must be {form}.of(layer), for input rows of channels x positions'
        return ''

    def empty(self, statistic: Statistic) -> dict[str, Tensor]:
        """Zeros in the shapes of a statistic's tensors."""
        return {
            key: self.weight.new_zeros(shape, dtype=self.working_dtype)
            for key, shape in self.shapes(statistic).items()
        }

    def seed_of(self, key: str) -> int:
        """Seed of the random numbers of this layer and a statistic, the same in all steps."""
        return crc32(f'{self.name} {key}'.encode())

    # ---------------------------------------------------------------- matrix form

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias if it is joint."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """Puts a weight-shaped tensor into the matrix form, without the column of a joint bias."""
        return weight.to(self.working_dtype).reshape(self.blocks, self.rows, -1)

    def join(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Puts weight- and bias-shaped tensors into the matrix form (blocks, o, i)."""
        matrix = self.weight_matrix(weight)
        return matrix if self.bias is None else torch.cat([matrix, self.bias_column(bias)], 2)

    def bias_column(self, bias: Tensor | None) -> Tensor:
        """Puts a bias-shaped tensor into the matrix form (blocks, o, 1); None gives zeros."""
        shape = (self.blocks, self.rows, 1)
        if bias is None:
            return self.weight.new_zeros(shape, dtype=self.working_dtype)
        return bias.to(self.working_dtype).reshape(shape)

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
            observe: Function that takes the calls.
            complain: Function that takes reasons why a call could not be read.

        Returns:
            Handles that remove the hooks.
        """

        def report(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            observe(Call(self, module), (inputs,), output)

        # Prepended, because a user's hook may replace the output.
        return [
            module.register_forward_hook(Tap(report), with_kwargs=True, prepend=True)
            for module in self.modules
        ]

    def count_rows(self, call: Call, gradient: Tensor, statistics: Sequence[Statistic]) -> int:
        """Number of rows of one call, the divisor of its input statistics."""
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
            kept: Tensors that were kept of the call.
            gradient: Gradient of the loss with respect to the call's output.
            statistics: The statistics to measure.
            generator: Generator of the call's random choices.

        Returns:
            Sums by tensor name, in `working_dtype`, from `Form.measure`.
        """
        drawing = Drawing(self, call.module, gradient, generator)
        sums: dict[str, Tensor] = {}
        for statistic in statistics:
            rows = LayerRows(self, call.module, kept[0], gradient, statistic, drawing)
            sums.update(zip(statistic.keys, statistic.form.measure(rows), strict=True))
        return sums

    def measure_flops(
        self, call: Call, kept: tuple[Tensor, ...], output: Tensor, statistic: Statistic
    ) -> float:
        """Approximate FLOPs of `measure` for one statistic of one call.

        Args:
            call: The call.
            kept: Tensors that `measure` would take.
            output: Output of the call; only its shape matters.
            statistic: The statistic.
        """
        if not statistic.form.is_product:  # one pass, over images rather than patches
            return float((output if statistic.side.of_gradient else kept[0]).numel())
        rows = self.count_rows(call, output, (statistic,))
        if isinstance(statistic.rows, SampledRows) and not isinstance(statistic.form, PatchForm):
            samples = self.sample_count(call.module, output)
            rows = min(rows, samples * statistic.rows.count(samples))
        return sum(
            statistic.form.measure_flops(rows, *shape) for shape in self.shapes(statistic).values()
        )

    def input_moment(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Sum of x'x over all rows x of one call.

        Args:
            module: The module that was called.
            inputs: Input of the module, in any dtype.

        Returns:
            The sum (blocks, i, i) in `working_dtype`.
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
        """Uninitialised tensor (blocks, i, i) for the input moment."""
        return self.weight.new_empty(
            (self.blocks, self.columns, self.columns), dtype=self.working_dtype
        )

    def with_border(self, moment: Tensor, sums: Tensor, count: int) -> Tensor:
        """Fills in a moment's last row and column for the 1 of a joint bias, if there is one.

        Args:
            moment: The moment (blocks, i, i), changed in place.
            sums: Sums of the rows without the 1 (blocks, i - 1).
            count: Number of rows.
        """
        if self.bias is not None:
            moment[:, -1, :-1] = moment[:, :-1, -1] = sums
            moment[:, -1, -1] = count
        return moment

    def with_ones(self, rows: Tensor) -> Tensor:
        """Appends the trailing 1 of a joint bias to rows (blocks, i, n), if there is one."""
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

    # ---------------------------------------------------------------- rows, defined by subclasses

    def input_rows(self, module: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
        """Chunks (blocks, i without bias, rows) of the input rows, in `working_dtype`."""
        raise TypeError(f'{type(self).__name__} must say what its input rows are')

    def gradient_rows(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """Rows (blocks, o, rows) of an output gradient."""
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
        """Number of positions per sample."""
        raise TypeError(f'{type(self).__name__} must say what the rows of a sample are')

    def position_sizes(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """Sum over samples of the squared gradient rows at each position (positions,)."""
        rows = self.gradient_rows(module, gradient.to(self.working_dtype))
        samples = self.sample_count(module, gradient)
        return rows.square().sum((0, 1)).unflatten(0, (samples, -1)).sum(0)

    def sampled_input(self, module: nn.Module, inputs: Tensor, drawn: Tensor) -> Tensor:
        """Input rows at the drawn positions of each sample (blocks, i without bias, rows)."""
        raise TypeError(f'{type(self).__name__} must say what the rows of a sample are')

    def sampled_gradient(self, module: nn.Module, gradient: Tensor, drawn: Tensor) -> Tensor:
        """Gradient rows at the drawn positions of each sample (blocks, o, rows)."""
        raise TypeError(f'{type(self).__name__} must say what the rows of a sample are')


#: Row kinds of layers that distinguish samples and positions.
EVERY_ROW_KIND: tuple[type[Rows], ...] = (AllRows, ReducedRows, SampledRows)
