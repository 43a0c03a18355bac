"""Contract of a form: the sum over a side's rows, and the damped power made of it.

A form is a value object without state. Tensors of one layer are (b, n, m), tensors of a stack are
(k, b, n, m), with b blocks of a side of length n.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..linalg import Dense, Operator, RankSearch, Shape

if TYPE_CHECKING:
    from .layer import Layer
    from .rows import LayerRows


@dataclass(frozen=True)
class Power:
    """Computation of ``(A + mu I)^-exponent``.

    Attributes:
        solve: Function of damped matrices and the last result (or None). It returns the powers,
            and a bool tensor (k, b) that is False where one failed.
        exponent: The exponent. `solve` implies it; computations by columns read it here.
        search: Search for the rank of a low-rank power, or None for dense powers.
        spectrum: What `solve` makes of single eigenvalues, if that is not the exact power: a
            function of damped eigenvalues (k, b, n, m) and damped traces (k, b, 1, 1).
    """

    solve: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
    exponent: float = 1.0
    search: RankSearch | None = None
    spectrum: Callable[[Tensor, Tensor], Tensor] | None = None

    def of_eigenvalues(self, values: Tensor, trace: Tensor) -> Tensor:
        """Powers of damped eigenvalues (k, b, n, m), given the damped traces (k, b)."""
        if self.spectrum is None:
            return values.pow(-self.exponent)
        return self.spectrum(values, trace[..., None, None])


@dataclass
class Slots:
    """Slots for columns; each rank fills its own share first.

    Attributes:
        count: Number of slots.
        taken: Next slot; at first, the first slot of this rank's share.
        generator: Generator of the columns' signs.
    """

    count: int
    taken: int
    generator: torch.Generator

    def claim(self, columns: int) -> Tensor:
        """Returns slots for a number of columns; once all are taken, slots are used again."""
        places = (torch.arange(columns, device='cpu') + self.taken) % self.count
        self.taken += columns
        return places


@dataclass(frozen=True, eq=False)
class Factor:
    """Running statistic as the input of a refresh.

    Attributes:
        form: Form of the statistic.
        tensors: Tensors (k, b, n, m) that `Form.finalize` returned.
    """

    form: Form
    tensors: tuple[Tensor, ...]

    @property
    def tensor(self) -> Tensor:
        """The only tensor of a form that has one."""
        (tensor,) = self.tensors
        return tensor

    @property
    def length(self) -> int:
        """Side length of the moment's blocks."""
        return self.form.length(self)

    def trace(self) -> Tensor:
        """Trace (k, b) of the moment that the factor represents."""
        return self.form.trace(self)

    def largest_eigenvalue(self) -> Tensor:
        """Estimate (k, b) of the moment's largest eigenvalue."""
        return self.form.largest_eigenvalue(self)

    def damped_power(
        self, amount: Callable[[Factor], Tensor], power: Power, previous: Operator | None = None
    ) -> tuple[Operator, Tensor]:
        """Damped power of the moment.

        Args:
            amount: Function that returns the damping (k, b) of a factor.
            power: The power and its solver.
            previous: The last operator, as a start for the new one, or None.

        Returns:
            The operator, and a bool tensor (k, b) that is False where the computation failed.
        """
        return self.form.damped_power(self, amount, power, previous)


class Form(ABC):
    """Quantity that is summed over the rows of one side, and the operator made of it."""

    #: The form's part of a statistic's name.
    suffix: ClassVar[str]
    #: Whether the form uses matrix products, which a lower precision rounds.
    is_product: ClassVar[bool] = True
    #: Whether the form has a width of its own, so that `max_dim` does not apply.
    is_bounded: ClassVar[bool] = False
    #: Whether `stage` distributes the sum of a call over slots before it is added.
    is_placed: ClassVar[bool] = False
    #: Whether only sides that declare this form support it.
    is_special: ClassVar[bool] = False
    #: Operator that rotates by the eigenvectors of the form's moments.
    basis: ClassVar[type[Operator]] = Dense

    def keys(self, key: str) -> tuple[str, ...]:
        """Names of the form's tensors, given the name of the statistic."""
        return (key,)

    @abstractmethod
    def shapes(self, blocks: int, size: int) -> tuple[Shape, ...]:
        """Shapes (b, n, m) of the form's tensors, given the blocks and length of a side."""

    @abstractmethod
    def measure(self, rows: LayerRows) -> tuple[Tensor, ...]:
        """Sums over the rows of one call, in the order of `keys`."""

    @abstractmethod
    def measure_flops(self, rows: int, blocks: int, size: int, width: int) -> float:
        """Approximate FLOPs of `measure`, given the shape of its result."""

    def stage(self, measured: Tensor, slots: Slots) -> Tensor:
        """Distributes a call's sum over slots, in the shape of the statistic."""
        return measured

    def rescale(self, total: Tensor, factor: float) -> None:
        """Multiplies the quantity that the sum represents by a factor, in place."""
        total *= factor

    def norm(self, samples: Sequence[Tensor], sizes: Sequence[float] | None) -> Tensor | float:
        """Divisor of a sample that gives all samples equal weight.

        Args:
            samples: Tensors of the sample (b, n, m).
            sizes: Frobenius norms of the tensors over all blocks, where they are known.

        Returns:
            Frobenius norm of each block (b, 1, 1), or a number for a single block.
        """
        (sample,) = samples
        if len(sample) == 1 and sizes:
            return sizes[0]
        return torch.linalg.matrix_norm(sample)[..., None, None]

    def finalize(
        self, tensors: tuple[Tensor, ...], layers: Sequence[Layer], key: str
    ) -> tuple[Tensor, ...]:
        """Turns running tensors (k, b, n, m) of some layers into the input of `damped_power`."""
        return tensors

    def note(self, size: int) -> str:
        """Note for the layer table, or ''."""
        return ''

    def outline(self, blocks: int, size: int, layer: Layer, search: RankSearch | None) -> Operator:
        """Operator of a layer in its likely shape, on the meta device."""
        raise TypeError(
            f'{type(self).__name__} has no power; the preconditioner must define outline '
            'for its operators'
        )

    def length(self, factor: Factor) -> int:
        """See `Factor.length`."""
        return factor.tensors[0].shape[-2]

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
