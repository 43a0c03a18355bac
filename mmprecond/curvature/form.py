"""The contract of a form: what is kept of a side's rows, and its damped power.

A form is a value object without state. Tensors of one layer are (b, n, m), of a stack (k, b, n, m),
with b blocks of a side of length n.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..linalg import Operator, RankSearch, Shape

if TYPE_CHECKING:
    from .layer import Layer
    from .rows import LayerRows


@dataclass(frozen=True)
class Power:
    """Way in which ``(A + mu I)^-exponent`` is taken.

    Attributes:
        solve: Called with damped matrices and the last result or None; returns the powers, and
            whether each succeeded (k, b).
        exponent: `solve` has it built in; other forms read it here.
        search: When a power is kept as columns; None: never.
    """

    solve: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
    exponent: float = 1.0
    search: RankSearch | None = None


@dataclass
class Slots:
    """Places of columns: a rank fills its own share first.

    Attributes:
        count: Number of slots.
        taken: The next slot; at first, this rank's first one.
        generator: Draws the columns' signs.
    """

    count: int
    taken: int
    generator: torch.Generator

    def claim(self, columns: int) -> Tensor:
        """Places of so many columns; once all slots are taken, on top of others."""
        places = (torch.arange(columns, device='cpu') + self.taken) % self.count
        self.taken += columns
        return places


@dataclass(frozen=True, eq=False)
class Factor:
    """A running statistic as a refresh takes it.

    Attributes:
        form: Its form.
        tensors: Its tensors (k, b, n, m), made ready by `Form.finalize`.
    """

    form: Form
    tensors: tuple[Tensor, ...]

    @property
    def tensor(self) -> Tensor:
        """The tensor of a form that has one."""
        (tensor,) = self.tensors
        return tensor

    def trace(self) -> Tensor:
        """Trace (k, b) of the moment that it stands for."""
        return self.form.trace(self)

    def largest_eigenvalue(self) -> Tensor:
        """Estimate (k, b) of the moment's largest eigenvalue."""
        return self.form.largest_eigenvalue(self)

    def damped_power(
        self, amount: Callable[[Factor], Tensor], power: Power, previous: Operator | None = None
    ) -> tuple[Operator, Tensor]:
        """The moment's damped power.

        Args:
            amount: Of a factor, what is added to its diagonal (k, b).
            power: Which power, and how.
            previous: The last one, where a new one may start.

        Returns:
            The operator, and a bool tensor (k, b) that is False where it failed.
        """
        return self.form.damped_power(self, amount, power, previous)


class Form(ABC):
    """Quantity that is kept of the rows of one side, and the operator made of it."""

    #: Its part of a statistic's name.
    suffix: ClassVar[str]
    #: Whether it is made by products of matrices, which a lower precision rounds.
    is_product: ClassVar[bool] = True
    #: Whether its width is a setting of its own, which `max_dim` leaves alone.
    is_bounded: ClassVar[bool] = False
    #: Whether a call's sum is placed by `stage`, rather than added as it is.
    is_placed: ClassVar[bool] = False
    #: Whether only sides that declare this form have it.
    is_special: ClassVar[bool] = False

    def keys(self, key: str) -> tuple[str, ...]:
        """Names of its tensors, given the statistic's."""
        return (key,)

    @abstractmethod
    def shapes(self, blocks: int, size: int) -> tuple[Shape, ...]:
        """Shapes (b, n, m) of its tensors for blocks of a side's length."""

    @abstractmethod
    def measure(self, rows: LayerRows) -> tuple[Tensor, ...]:
        """Sums over the rows of one call, in the order of `keys`."""

    @abstractmethod
    def measure_flops(self, rows: int, blocks: int, size: int, width: int) -> float:
        """About the floating-point operations of `measure`, given its shape."""

    def stage(self, measured: Tensor, slots: Slots) -> Tensor:
        """A call's sum in the shape of the statistic, of forms that are placed."""
        return measured

    def rescale(self, total: Tensor, factor: float) -> None:
        """Multiplies the quantity that the sum stands for, in place."""
        total *= factor

    def norm(self, samples: Sequence[Tensor], sizes: Sequence[float] | None) -> Tensor | float:
        """Norm by which a sample is divided, so that all samples weigh alike.

        Args:
            samples: Its tensors (b, n, m).
            sizes: Their Frobenius norms over all blocks, where they are known.

        Returns:
            The Frobenius norm, of each block by itself (b, 1, 1).
        """
        (sample,) = samples
        if len(sample) == 1 and sizes:
            return sizes[0]
        return torch.linalg.matrix_norm(sample)[..., None, None]

    def finalize(
        self, tensors: tuple[Tensor, ...], layers: Sequence[Layer], key: str
    ) -> tuple[Tensor, ...]:
        """Running tensors (k, b, n, m) of some layers, as `damped_power` takes them."""
        return tensors

    def note(self, size: int) -> str:
        """Note for the layer table, or ''."""
        return ''

    def outline(self, blocks: int, size: int, layer: Layer, search: RankSearch | None) -> Operator:
        """The likely operator of a layer, on the meta device."""
        raise TypeError(
            f'{type(self).__name__} has no power; the preconditioner must say what '
            'operator it makes of it'
        )

    def trace(self, factor: Factor) -> Tensor:
        """See `Factor.trace`."""
        raise TypeError(f'{type(self).__name__} is no second moment')

    def largest_eigenvalue(self, factor: Factor) -> Tensor:
        """See `Factor.largest_eigenvalue`."""
        raise TypeError(f'{type(self).__name__} is no second moment')

    def damped_power(
        self,
        factor: Factor,
        amount: Callable[[Factor], Tensor],
        power: Power,
        previous: Operator | None,
    ) -> tuple[Operator, Tensor]:
        """See `Factor.damped_power`."""
        raise TypeError(f'{type(self).__name__} is no second moment')


def add_damping(matrices: Tensor, damping: Tensor) -> Tensor:
    """``A + mu I`` for matrices (..., n, n) and dampings mu (...)."""
    damped = matrices.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping[..., None])
    return damped
