"""The contract of a preconditioner: settings and pure functions of stacks of matrices.

A method keeps no state. Statistics, operators and counters live in `LayerStack`, so that the
failure ladder, checkpoints and the batching over layers are written once for all methods.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_number
from ..curvature import BLOCKS, COLUMNS, MOMENT, SAMPLED, SKETCH, Layer, RunningAverage
from .sides import SCALE, LowRank, Stacked, operator_shapes

#: What stands for the moment of a side over max_dim.
OVERSIZE = {'skip': None, 'one_sided': None, 'block': BLOCKS, 'lowrank': SKETCH}


@dataclass(frozen=True, kw_only=True)
class Preconditioner(ABC):
    """One method with its settings. Shapes: k layers, b blocks, gradient matrices o x i.

    Attributes:
        stat_interval: Steps between captures; t counts from 0 and a capture is due when
            t % stat_interval == 0.
        refresh_interval: Steps between refreshes, likewise; a multiple of `stat_interval`.
        max_dim: Largest side of a factor. 8192 in float32 is 268 MB a matrix.
        oversize: What happens to a layer with a larger side: 'skip' gives the layer to the plain
            rule; 'one_sided' leaves that side alone and preconditions the other; 'block' takes
            that side's factor in diagonal blocks of at most `max_dim`; 'lowrank' as `max_rank`
            eigenvectors, found from a random sketch, beside the damping. The last two skip
            attention modules and grouped convolutions.
        max_rank: Most columns that stand for a side: the rank of oversize='lowrank' (default 256),
            and of solver='lowrank' (default: as many as its tolerance asks for).
        max_rows: Rows that a capture takes of a convolution or a layer on tokens at a call: as
            many positions of each sample, drawn at random, for all; at least one. None takes all.
            The statistics are right in the mean.
    """

    stat_interval: int = 20
    refresh_interval: int = 200
    max_dim: int = 8192
    oversize: str = 'skip'
    max_rank: int | None = None
    max_rows: int | None = None

    #: Statistics that the method needs of a layer.
    requires: ClassVar[tuple[str, ...]] = ()
    #: Names of the rules that the method works with; none means all.
    rules: ClassVar[tuple[str, ...]] = ()
    #: Steps are counted from here when intervals fall due: 0 captures and refreshes at once.
    phase: ClassVar[int] = 0
    #: Whether a layer whose first statistics come late is refreshed at once.
    eager: ClassVar[bool] = True
    #: Whether its statistics are put in at the start, rather than captured.
    given: ClassVar[bool] = False
    #: Whether the rule works in the space of `apply`, from which `restore` leads back.
    rotates: ClassVar[bool] = False
    #: Whether `restore` changes the rule's directions.
    restores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ('stat_interval', 'refresh_interval', 'max_dim'):
            check_count(name, getattr(self, name))
        for name in ('max_rank', 'max_rows'):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_choice('oversize', self.oversize, tuple(OVERSIZE))
        if self.rotates and OVERSIZE[self.oversize]:
            raise ValueError(f"oversize={self.oversize!r} is for inverses; {type(self).__name__} "
                             "turns gradients, and takes 'skip' or 'one_sided'")
        if self.refresh_interval % self.stat_interval:
            raise ValueError(f'refresh_interval={self.refresh_interval} must be a multiple of '
                             f'stat_interval={self.stat_interval}')

    @classmethod
    def options(cls) -> list[str]:
        """Names of the settings."""
        return [field.name for field in fields(cls)]

    @property
    def attention_windows(self) -> int:
        """Windows it measures of an attention module a call; 0 takes the linear layers alone."""
        return 0

    @property
    def attention_bias(self) -> bool:
        """Whether biases are joint with the weights of attention modules."""
        return False

    @property
    def capture_interval(self) -> int:
        """Steps between captures that serve a layer that has statistics."""
        return self.stat_interval

    @property
    def layer_options(self) -> dict[str, int | str | None]:
        """Attributes of a layer on which its statistics depend."""
        return dict(block=self.max_dim, rank=self.max_rank or Layer.rank, max_rows=self.max_rows)

    def wanted(self, layer: Layer) -> tuple[str, ...]:
        """The statistics that the method would keep of a layer, whatever their size."""
        return self.requires

    def required(self, layer: Layer) -> tuple[str, ...]:
        """The statistics kept of a layer; none leaves it to the rule."""
        sampled = self.max_rows is not None and layer.has_positions
        wanted = tuple(name + SAMPLED if sampled and name.endswith((MOMENT, SKETCH)) else name
                       for name in self.wanted(layer))
        large = {name for name in wanted
                 if COLUMNS not in name and layer.statistic_shape(name)[-1] > self.max_dim}
        form = OVERSIZE[self.oversize]
        if form and (layer.compressible or not large):
            return tuple(name.replace(MOMENT, form) if name in large else name for name in wanted)
        kept = tuple(name for name in wanted if name not in large)
        return kept if not large or self.oversize == 'one_sided' else ()

    def essential(self, layer: Layer) -> tuple[str, ...]:
        """The statistics without which a sample tells nothing: those that must not be zero."""
        return self.required(layer)

    def gradient_factor(self, rows: float) -> float:
        """By what the sums of squared gradient rows are multiplied, given the number of rows.

        The rows are those of the gradient of the step's mean loss.
        """
        return 1.

    def reads_weight(self, layer: Layer) -> bool:
        """Whether `refresh` also needs the layers' weights (k, b, o, i), as 'weight'."""
        return False

    def operator_shapes(self, layer: Layer) -> dict[str, tuple[int, int, int]]:
        """Shapes (b, n, m) of a layer's operators by name; by default those of `sides`."""
        return operator_shapes(layer, self.required(layer), self.low_rank)

    def apply_flops(self, layer: Layer) -> float:
        """Floating-point operations of one step's products with a layer's gradient."""
        total = 0.
        for name, (_, _, width) in self.operator_shapes(layer).items():
            if SCALE not in name:
                products = 2 if COLUMNS in name else 1  # with U, and with U'
                total += 2. * products * math.prod(layer.shape) * width
        return total * (1 + self.rotates)

    def refresh_flops(self, layer: Layer) -> float:
        """About the operations of one refresh: n^3 for each factor."""
        return sum(float(b * n * m * m)
                   for b, n, m in map(layer.statistic_shape, self.required(layer)))

    @property
    def is_inverse(self) -> bool:
        """Whether its dense operators are inverses of damped moments."""
        return False

    @property
    def low_rank(self) -> LowRank | None:
        """When operators come as columns whose number is found at a refresh; None: never."""
        return None

    def note(self, layer: Layer) -> str:
        """What the table adds to the method's name, such as what it leaves out; or ''."""
        required, wanted = self.required(layer), self.wanted(layer)
        if len(required) < len(wanted):
            return f'one side: the other is over max_dim={self.max_dim}'
        notes = []
        for name in required:
            size = layer.statistic_shape(name)[-1]
            notes += [f'{name.split("_")[0]} side {text} {size}' for form, text
                      in ((BLOCKS, 'in blocks of'), (SKETCH, 'of rank')) if form in name]
        return ', '.join(notes)

    def is_exact(self, refreshes: int) -> bool:
        """Whether a layer's refresh number `refreshes` (from 0) starts from nothing."""
        return True

    @abstractmethod
    def average(self) -> RunningAverage:
        """How samples merge into the running statistics."""

    @abstractmethod
    def refresh(self, statistics: Stacked, previous: Stacked | None,
                damping: Tensor | float | None) -> tuple[Stacked, Tensor]:
        """Turns statistics into operators.

        Args:
            statistics: Running statistics (k, b, n, n) by name.
            previous: The operators of the last refresh, or None for an exact refresh.
            damping: Damping for these layers (k, 1) where some layers override the setting, else
                None.

        Returns:
            Operators by name, and a bool tensor (k,) that is False where a refresh failed.
        """

    @property
    def clip(self) -> float | None:
        """Bound of the KL clip that is taken over all layers, or None."""
        return None

    def align(self, operator: Stacked, previous: Stacked | None) -> Stacked:
        """New operators in the form closest to the previous ones, where they have a choice."""
        return operator

    def restore(self, operator: Stacked, directions: Tensor) -> Tensor:
        """Turns the rule's directions (k, b, o, i) into steps; only of methods that restore."""
        return directions

    @abstractmethod
    def apply(self, operator: Stacked, gradients: Tensor) -> Tensor:
        """Preconditions gradients (k, b, o, i)."""


@dataclass(frozen=True, kw_only=True)
class InversePreconditioner(Preconditioner):
    """One whose operators are negative powers of damped moments, by a choice of solvers.

    Attributes:
        solver: 'lowrank' keeps of a side's power the eigenvectors that stand out of the damping,
            where they are fewer than half (see `LowRank`); the others are the method's own.
        tolerance: Relative error that 'lowrank' allows an operator in any direction, less than 1:
            at 0.1 and exponent 1, eigenvalues below 0.22 times the damping are left out.
    """

    solver: str = 'lowrank'
    tolerance: float = 0.1

    #: Its other solvers.
    dense_solvers: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice('solver', self.solver, (*self.dense_solvers, 'lowrank'))
        check_number('tolerance', self.tolerance, open_low=True, high=1)

    @property
    def low_rank(self) -> LowRank | None:
        """With solver='lowrank'."""
        return LowRank(self.tolerance, self.max_rank) if self.solver == 'lowrank' else None

    def is_exact(self, refreshes: int) -> bool:
        """All but those of low rank, which start from the last."""
        return self.solver != 'lowrank' or refreshes == 0


def damping_like(value: Tensor | float, like: Tensor) -> Tensor:
    """An absolute damping, for all layers or one for each, in the form (k or 1, 1, 1, 1)."""
    amount = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return amount.reshape(-1, 1, 1, 1)


def check_damping(name: str, value: float) -> None:
    """Raises ValueError unless a damping is a positive number."""
    check_number(name, value, open_low=True)
