"""Structured matrices that act on gradients: dense, in blocks, of low rank, diagonal, rank one.

An operator stands for the matrices of k layers with b blocks each. Its tensors have the leading
dimensions (k, b), but for `BlockDiagonal`, whose blocks follow k at once. The operators of a
preconditioner are a dict by slot ('input', 'gradient', ...); a tensor's name in checkpoints is
``<slot>_<suffix>``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import Self

from .lowrank import apply_columns, columns_to_matrix
from .products import stacked_product

#: Shape (b, n, m) of a tensor of one layer.
Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Operator(ABC):
    """Matrices A (k, b, n, n); the fields of a subclass are its tensors."""

    #: Endings of the tensors' names in checkpoints, in the order of the fields.
    suffixes: ClassVar[tuple[str, ...]] = ('',)

    @classmethod
    def outline(cls, *shapes: Shape) -> Self:
        """An operator of one layer without numbers, on the meta device, from its shapes."""
        return cls(*(torch.empty(1, *shape, device='meta') for shape in shapes))

    @property
    def tensors(self) -> list[Tensor]:
        """Its tensors, in the order of `suffixes`."""
        return list(vars(self).values())  # a dataclass has its fields there, in their order

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The operator with a function applied to each tensor."""
        return type(self)(*map(function, self.tensors))

    @abstractmethod
    def right(self, matrices: Tensor) -> Tensor:
        """``M A`` for matrices M (k, b, o, n)."""

    @abstractmethod
    def left(self, matrices: Tensor) -> Tensor:
        """``A M`` for matrices M (k, b, n, i)."""

    def unify(self, other: Operator) -> tuple[Operator, Operator]:
        """This operator and another of the same slot, in forms that can be stacked."""
        return self, other

    @property
    def alternatives(self) -> tuple[type[Operator], ...]:
        """Forms in which a refresh may leave this operator; the first is its own."""
        return (type(self),)

    def shape_in(self, form: type[Operator], tensors: Sequence[Tensor]) -> list[Shape]:
        """Shapes that a saved operator must have, given its form and its tensors (b, n, m)."""
        return [_layer_shape(tensor) for tensor in self.tensors]


@dataclass(frozen=True, eq=False)
class Dense(Operator):
    """Matrices laid out (k, b, n, n)."""

    matrix: Tensor
    suffixes: ClassVar[tuple[str, ...]] = ('moment',)

    def right(self, matrices: Tensor) -> Tensor:
        """``M A`` (see the base class)."""
        return stacked_product(matrices, self.matrix)

    def left(self, matrices: Tensor) -> Tensor:
        """``A M`` (see the base class)."""
        return stacked_product(self.matrix, matrices)

    def unify(self, other: Operator) -> tuple[Operator, Operator]:
        """Both dense."""
        return self, other.to_dense() if isinstance(other, LowRank) else other


@dataclass(frozen=True, eq=False)
class BlockDiagonal(Operator):
    """Symmetric matrices in diagonal blocks (k, count, m, m), the last filled up with zeros.

    Where a layer has several blocks of its own, each has an equal share of these.
    """

    blocks: Tensor
    suffixes: ClassVar[tuple[str, ...]] = ('blocks',)

    def right(self, matrices: Tensor) -> Tensor:
        """``M A`` (see the base class)."""
        k, b, o, n = matrices.shape
        size = self.blocks.shape[-1]
        count = self.blocks.shape[1] // b
        padded = F.pad(matrices, (0, count * size - n))
        pieces = padded.reshape(k, b, o, count, size).transpose(2, 3)
        products = pieces @ self.blocks.reshape(k, b, count, size, size)
        return products.transpose(2, 3).reshape(k, b, o, count * size)[..., :n]

    def left(self, matrices: Tensor) -> Tensor:
        """``A M`` (see the base class)."""
        return self.right(matrices.mT).mT


@dataclass(frozen=True, eq=False)
class LowRank(Operator):
    """``scale (I - U U')`` from columns U (k, b, n, r) and a scale (k, b, 1, 1)."""

    columns: Tensor
    scale: Tensor
    suffixes: ClassVar[tuple[str, ...]] = ('columns', 'scale')

    def right(self, matrices: Tensor) -> Tensor:
        """``M A`` (see the base class)."""
        return apply_columns(matrices, self.columns, self.scale)

    def left(self, matrices: Tensor) -> Tensor:
        """``A M`` (see the base class)."""
        return self.right(matrices.mT).mT

    def to_dense(self) -> Dense:
        """The same matrices, laid out."""
        return Dense(columns_to_matrix(self.columns, self.scale))

    def unify(self, other: Operator) -> tuple[Operator, Operator]:
        """As many columns in both, filled up with zeros; or both dense."""
        if not isinstance(other, LowRank):
            return self.to_dense(), other
        width = max(self.columns.shape[-1], other.columns.shape[-1])
        return self._widened(width), other._widened(width)

    def _widened(self, width: int) -> LowRank:
        return LowRank(F.pad(self.columns, (0, width - self.columns.shape[-1])), self.scale)

    @property
    def alternatives(self) -> tuple[type[Operator], ...]:
        """Dense where too many columns would stand out."""
        return LowRank, Dense

    def shape_in(self, form: type[Operator], tensors: Sequence[Tensor]) -> list[Shape]:
        """Any number of columns up to n (see the base class)."""
        blocks, size, _ = _layer_shape(self.columns)
        if form is Dense:
            return [(blocks, size, size)]
        width = tensors[0].shape[-1] if tensors[0].dim() == 3 else self.columns.shape[-1]
        return [(blocks, size, min(width, size)), _layer_shape(self.scale)]


@dataclass(frozen=True, eq=False)
class Diagonal(Operator):
    """Diagonal matrices: their entries (k, b, n, 1) to act from the left, (k, b, 1, n) right."""

    entries: Tensor

    def right(self, matrices: Tensor) -> Tensor:
        """``M A`` (see the base class)."""
        return matrices * self.entries

    def left(self, matrices: Tensor) -> Tensor:
        """``A M`` (see the base class)."""
        return self.entries * matrices


@dataclass(frozen=True, eq=False)
class RankOne(Operator):
    """``I - u u'`` from vectors u (k, b, n, 1)."""

    vector: Tensor

    def right(self, matrices: Tensor) -> Tensor:
        """``M A`` (see the base class)."""
        return matrices - (matrices @ self.vector) @ self.vector.mT

    def left(self, matrices: Tensor) -> Tensor:
        """``A M`` (see the base class)."""
        return matrices - self.vector @ (self.vector.mT @ matrices)


#: Operators by slot.
Operators = dict[str, Operator]


def named_tensors(operators: Operators) -> dict[str, Tensor]:
    """The tensors of some operators by their names in checkpoints."""
    return {
        name: tensor
        for slot, operator in operators.items()
        for name, tensor in zip(_tensor_names(slot, type(operator)), operator.tensors, strict=True)
    }


def map_tensors(operators: Operators, function: Callable[[Tensor], Tensor]) -> Operators:
    """Operators with a function applied to each tensor."""
    return {slot: operator.map(function) for slot, operator in operators.items()}


def unify(first: Operators, second: Operators) -> tuple[Operators, Operators]:
    """The same operators in forms that can be stacked; nothing to do where one has none."""
    if not first or not second:
        return dict(first), dict(second)
    pairs = {slot: operator.unify(second[slot]) for slot, operator in first.items()}
    return (
        {slot: pair[0] for slot, pair in pairs.items()},
        {slot: pair[1] for slot, pair in pairs.items()},
    )


def join(rows: Iterable[Operators]) -> Operators:
    """Operators of several layers as one stack; zeros for a layer that has none."""
    rows = list(rows)
    common: Operators = reduce(lambda known, row: unify(known, row)[0] or row, rows, {})
    zeros = map_tensors(common, torch.zeros_like)
    parts = [unify(row, common)[0] or zeros for row in rows]
    return {
        slot: type(operator)(
            *map(torch.cat, zip(*(part[slot].tensors for part in parts), strict=True))
        )
        for slot, operator in common.items()
    }


def write(
    held: Operators, new: Operators, positions: Sequence[int], count: int, chosen: Tensor
) -> Operators:
    """Some layers' operators written into a stack's.

    Args:
        held: The stack's operators; none before the first refresh.
        new: Operators of the layers at `positions`.
        positions: Places in the stack.
        count: Number of layers in the stack.
        chosen: A bool tensor (len(positions),): which of the new operators count.

    Returns:
        The stack's operators; tensors of `held` may have been written to.
    """
    new, held = unify(new, held)
    if not held:
        held = map_tensors(new, lambda t: t.new_zeros(count, *t.shape[1:]))
    return {
        slot: type(operator)(
            *(
                _write_rows(old, tensor, positions, chosen)
                for old, tensor in zip(held[slot].tensors, operator.tensors, strict=True)
            )
        )
        for slot, operator in new.items()
    }


def from_tensors(outline: Operators, tensors: Mapping[str, Tensor]) -> Operators:
    """Operators of one layer from saved tensors (b, n, m), in the forms that these have."""
    if not tensors:
        return {}
    return {
        slot: form(*(tensors[name][None] for name in _tensor_names(slot, form)))
        for slot, form in _saved_forms(outline, tensors).items()
    }


def expected_shapes(outline: Operators, tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Shapes that saved tensors must have to be operators like the outline, by name."""
    shapes: dict[str, Shape] = {}
    for slot, form in _saved_forms(outline, tensors).items():
        names = _tensor_names(slot, form)
        missing = any(name not in tensors for name in names)
        slot_tensors = outline[slot].tensors if missing else [tensors[name] for name in names]
        shapes.update(zip(names, outline[slot].shape_in(form, slot_tensors), strict=True))
    return shapes


def count_flops(function: Callable[..., object], *arguments: object) -> float:
    """Floating-point operations of the matrix products that a function forms."""
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return float(counter.get_total_flops())


def take(stacked: Tensor, positions: Sequence[int]) -> Tensor:
    """Rows of a stacked tensor; all of them without a copy."""
    return stacked if len(positions) == len(stacked) else stacked[list(positions)]


def _tensor_names(slot: str, form: type[Operator]) -> list[str]:
    return ['_'.join(filter(None, (slot, suffix))) for suffix in form.suffixes]


def _saved_forms(outline: Operators, tensors: Mapping[str, Tensor]) -> dict[str, type[Operator]]:
    """The form that each slot's saved tensors have; the outline's own where they have none."""
    return {
        slot: next(
            (
                form
                for form in operator.alternatives
                if all(name in tensors for name in _tensor_names(slot, form))
            ),
            type(operator),
        )
        for slot, operator in outline.items()
    }


def _write_rows(old: Tensor, new: Tensor, positions: Sequence[int], chosen: Tensor) -> Tensor:
    mask = chosen.reshape(-1, *[1] * (new.dim() - 1))
    # Row-major, as a loaded state is: products round alike before and after a resume.
    merged = torch.where(mask, new, take(old, positions)).contiguous()
    if len(positions) == len(old):
        return merged
    old[list(positions)] = merged
    return old


def _layer_shape(stacked: Tensor) -> Shape:
    blocks, height, width = stacked.shape[1:]
    return blocks, height, width
