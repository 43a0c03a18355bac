"""The contract of a preconditioner: settings and pure functions of stacks of matrices.

A method keeps no state. Statistics, operators and counters live in `LayerStack`, so that the
failure ladder, checkpoints and the batching over layers are written once for all methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_number
from ..curvature import Layer, RunningAverage
from ..linalg import largest_eigenvalue, woodbury_apply

#: Stacked tensors by name: (layers, blocks, n, n), of columns (layers, blocks, n, slots).
Stacked = dict[str, Tensor]

OVERSIZE = ('one_sided', 'skip')


@dataclass(frozen=True, kw_only=True)
class Preconditioner(ABC):
    """One method with its settings. Shapes: k layers, b blocks, gradient matrices o x i.

    Attributes:
        stat_interval: Steps between captures; t counts from 0 and a capture is due when
            t % stat_interval == 0.
        refresh_interval: Steps between refreshes, likewise; a multiple of `stat_interval`.
        max_dim: Largest side of a factor. 8192 in float32 is 268 MB a matrix.
        oversize: What happens to a layer with a larger side: 'one_sided' leaves that side alone
            and preconditions the other, 'skip' gives the layer to the plain rule.
    """

    stat_interval: int = 20
    refresh_interval: int = 200
    max_dim: int = 8192
    oversize: str = 'skip'

    #: Statistics that the method needs of a layer.
    requires: ClassVar[tuple[str, ...]] = ()
    #: Names of the rules that the method works with; none means all.
    rules: ClassVar[tuple[str, ...]] = ()
    #: Steps are counted from here when intervals fall due: 0 captures and refreshes at once.
    phase: ClassVar[int] = 0
    #: Whether a layer whose first statistics come late is refreshed at once.
    eager: ClassVar[bool] = True
    #: Whether the gradient second moment is that of each row's own loss: multiplied by the rows.
    per_row: ClassVar[bool] = False
    #: Whether the rule works in the space of `apply`, from which `restore` leads back.
    rotates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ('stat_interval', 'refresh_interval', 'max_dim'):
            check_count(name, getattr(self, name))
        check_choice('oversize', self.oversize, OVERSIZE)
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
    def capture_interval(self) -> int:
        """Steps between captures that serve."""
        return self.stat_interval

    @property
    def layer_options(self) -> dict[str, int]:
        """Attributes of a layer on which its statistics depend."""
        return {}

    def wanted(self, layer: Layer) -> tuple[str, ...]:
        """The statistics that the method would keep of a layer, whatever their size."""
        return self.requires

    def required(self, layer: Layer) -> tuple[str, ...]:
        """The statistics kept of a layer; none leaves it to the rule."""
        wanted = self.wanted(layer)
        kept = tuple(name for name in wanted if layer.statistic_shape(name)[-1] <= self.max_dim)
        return kept if len(kept) == len(wanted) or self.oversize == 'one_sided' else ()

    def essential(self, layer: Layer) -> tuple[str, ...]:
        """The statistics without which a sample tells nothing: those that must not be zero."""
        return self.required(layer)

    def reads_weight(self, layer: Layer) -> bool:
        """Whether `refresh` also needs the layers' weights (k, b, o, i), as 'weight'."""
        return False

    def operator_shapes(self, layer: Layer) -> dict[str, tuple[int, int, int]]:
        """Shapes (b, n, n) of a layer's operators by name; by default one for each statistic."""
        return {name: layer.statistic_shape(name) for name in self.required(layer)}

    def note(self, layer: Layer) -> str:
        """What the table adds to the method's name, such as what it leaves out; or ''."""
        whole = len(self.required(layer)) == len(self.wanted(layer))
        return '' if whole else f'one side: the other is over max_dim={self.max_dim}'

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
        """Turns the rule's directions (k, b, o, i) back; only of methods that rotate."""
        return directions

    @abstractmethod
    def apply(self, operator: Stacked, gradients: Tensor) -> Tensor:
        """Preconditions gradients (k, b, o, i)."""


def check_damping(name: str, value: float) -> None:
    """Raises ValueError unless a damping is a positive number."""
    check_number(name, value, open_low=True)


def add_damping(statistic: Tensor, damping: Tensor) -> Tensor:
    """``A + mu I`` for matrices (..., n, n) and dampings mu (...)."""
    damped = statistic.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping[..., None])
    return damped


def relative_damping(statistic: Tensor, damping: Tensor | float) -> Tensor:
    """``damping lambda_max`` of each matrix (..., b, n, n): (..., b).

    A block that is nothing beside its layer's others (a saturated head, a dead channel) is damped
    as rounding asks, and a layer that is nothing at all by 1.
    """
    largest = largest_eigenvalue(statistic)
    rounding = 10 * torch.finfo(statistic.dtype).eps
    peak = largest.amax(-1, keepdim=True) if largest.dim() else largest
    amount = damping * largest + rounding * peak
    return torch.where(amount > 0, amount, 1)


def recover_norm(directions: Tensor, gradients: Tensor) -> Tensor:
    """Scales each layer's direction (k, b, o, i) to its gradient's Frobenius norm (thesis (3.7)).

    One scalar a layer, over all its blocks, weight and joint bias together.
    """
    wanted = torch.linalg.vector_norm(gradients, dim=(1, 2, 3), keepdim=True)
    size = torch.linalg.vector_norm(directions, dim=(1, 2, 3), keepdim=True)
    return directions * (wanted / (size + 1e-12))


def two_sided(operator: Stacked, gradients: Tensor) -> Tensor:
    """``L G R`` for operators on both sides; a side without an operator is left alone.

    A side's operator is a matrix, or columns U and a scale with which it is scale (I - U U').
    """
    directions = gradients
    if 'gradient_moment' in operator:
        directions = operator['gradient_moment'] @ directions
    elif 'gradient_columns' in operator:
        directions = woodbury_apply(directions.mT, operator['gradient_columns'],
                                    operator['gradient_scale']).mT
    if 'input_moment' in operator:
        directions = directions @ operator['input_moment']
    elif 'input_columns' in operator:
        directions = woodbury_apply(directions, operator['input_columns'],
                                    operator['input_scale'])
    return directions
