"""Structured matrices that act on gradients: dense, block-diagonal, low-rank, diagonal, rank one.

An operator represents the matrices of k layers with b blocks each. Its tensors have the leading
dimensions (k, b). In `BlockDiagonal` the diagonal blocks take the place of b. A preconditioner's
operators are a dict by slot ('input', 'gradient', ...). The name of a tensor in checkpoints is
``<slot>_<suffix>``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from .lowrank import apply_columns, columns_to_matrix
from .products import add_product, stacked_product

#: Shape (b, n, m) of a tensor of one layer.
Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Operator(ABC):
    """Matrices A (k, b, n, n); the fields of a subclass are its tensors."""

    #: Suffixes of the tensors' names in checkpoints, in the order of the fields.
    suffixes: ClassVar[tuple[str, ...]] = ('',)

    @classmethod
    def outline(cls, *shapes: Shape) -> Self:
        """Operator of one layer on the meta device, from the shapes of its tensors."""
        return cls(*(torch.empty(1, *shape, device='meta') for shape in shapes))

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors of the operator, in the order of `suffixes`."""
        return [getattr(self, field.name) for field in fields(self)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Applies a function to each tensor of the operator."""
        return type(self)(*map(function, self.tensors))

    @abstractmethod
    def right(self, matrices: Tensor) -> Tensor:
        """``M A`` for matrices M (k, b, o, n)."""

    @abstractmethod
    def left(self, matrices: Tensor) -> Tensor:
        """``A M`` for matrices M (k, b, n, i)."""

    def unify(self, other: Operator) -> tuple[Operator, Operator]:
        """Returns this operator and another of the same slot, in forms that can be stacked."""
        return self, other

    @property
    def alternatives(self) -> tuple[type[Operator], ...]:
        """Operator types that a refresh may return for this slot, its own type first."""
        return (type(self),)

    def shape_in(self, form: type[Operator], tensors: Sequence[Tensor]) -> list[Shape]:
        """Shapes that a saved operator must have, given its form and its tensors (b, n, m)."""
        return [_layer_shape(tensor) for tensor in self.tensors]


@dataclass(frozen=True, eq=False)
class Dense(Operator):
    """Dense matrices (k, b, n, n)."""

    matrix: Tensor
    suffixes: ClassVar[tuple[str, ...]] = ('moment',)

    def right(self, matrices: Tensor) -> Tensor:
        """``M A`` (see the base class)."""
        return stacked_product(matrices, self.matrix)

    def left(self, matrices: Tensor) -> Tensor:
        """``A M`` (see the base class)."""
        return stacked_product(self.matrix, matrices)

    def unify(self, other: Operator) -> tuple[Operator, Operator]:
        """Makes both dense."""
        return self, other.to_dense() if isinstance(other, LowRank) else other


@dataclass(frozen=True, eq=False)
class BlockDiagonal(Operator):
    """Symmetric matrices as diagonal blocks (k, count, m, m); zeros pad the last one.

    If the layer itself has several blocks, each of them has an equal number of diagonal blocks.
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
        total = (matrices * self.scale).contiguous()
        add_product(total, self.columns, stacked_product(self.columns.mT, total), sign=-1)
        return total

    def to_dense(self) -> Dense:
        """The same matrices in dense form."""
        return Dense(columns_to_matrix(self.columns, self.scale))

    def unify(self, other: Operator) -> tuple[Operator, Operator]:
        """Pads the columns of the narrower one with zeros, or makes both dense."""
        if not isinstance(other, LowRank):
            return self.to_dense(), other
        width = max(self.columns.shape[-1], other.columns.shape[-1])
        return self._widened(width), other._widened(width)

    def _widened(self, width: int) -> LowRank:
        return LowRank(F.pad(self.columns, (0, width - self.columns.shape[-1])), self.scale)

    @property
    def alternatives(self) -> tuple[type[Operator], ...]:
        """Low-rank, or dense if the rank is too large."""
        return LowRank, Dense

    def shape_in(self, form: type[Operator], tensors: Sequence[Tensor]) -> list[Shape]:
        """Shapes with any number of columns up to n (see the base class)."""
        blocks, size, _ = _layer_shape(self.columns)
        if form is Dense:
            return [(blocks, size, size)]
        width = tensors[0].shape[-1] if tensors[0].dim() == 3 else self.columns.shape[-1]
        return [(blocks, size, min(width, size)), _layer_shape(self.scale)]


@dataclass(frozen=True, eq=False)
class Diagonal(Operator):
    """Diagonal matrices with entries (k, b, n, 1) for the left or (k, b, 1, n) for the right."""

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
    """Tensors of operators by their names in checkpoints."""
    return {
        name: tensor
        for slot, operator in operators.items()
        for name, tensor in zip(_tensor_names(slot, type(operator)), operator.tensors, strict=True)
    }


def map_tensors(operators: Operators, function: Callable[[Tensor], Tensor]) -> Operators:
    """Applies a function to each tensor of the operators."""
    return {slot: operator.map(function) for slot, operator in operators.items()}


def unify(first: Operators, second: Operators) -> tuple[Operators, Operators]:
    """Returns both operators in forms that can be stacked; an empty one changes nothing."""
    if not first or not second:
        return dict(first), dict(second)
    pairs = {slot: operator.unify(second[slot]) for slot, operator in first.items()}
    return (
        {slot: pair[0] for slot, pair in pairs.items()},
        {slot: pair[1] for slot, pair in pairs.items()},
    )


def join(rows: Iterable[Operators]) -> Operators:
    """Stacks the operators of several layers; a layer without operators gets zeros."""
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
    """Writes the operators of some layers into those of a stack.

    Args:
        held: Operators of the stack; empty before the first refresh.
        new: Operators of the layers at `positions`.
        positions: Positions in the stack.
        count: Number of layers in the stack.
        chosen: Bool tensor (len(positions),) that is True for new operators to write.

    Returns:
        Operators of the stack; the function may change tensors of `held` in place.
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
    """Operators of one layer from saved tensors (b, n, m), in the form of these tensors."""
    if not tensors:
        return {}
    return {
        slot: form(*(tensors[name][None] for name in _tensor_names(slot, form)))
        for slot, form in _saved_forms(outline, tensors).items()
    }


def expected_shapes(outline: Operators, tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Shapes by name that saved tensors must have to match the outline."""
    shapes: dict[str, Shape] = {}
    for slot, form in _saved_forms(outline, tensors).items():
        names = _tensor_names(slot, form)
        missing = any(name not in tensors for name in names)
        slot_tensors = outline[slot].tensors if missing else [tensors[name] for name in names]
        shapes.update(zip(names, outline[slot].shape_in(form, slot_tensors), strict=True))
    return shapes


def count_flops(function: Callable[..., object], *arguments: object) -> float:
    """FLOPs of the matrix products in a function."""
    from torch.utils.flop_counter import FlopCounterMode  # loads Triton

    with FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as counter:
        function(*arguments)
    return float(counter.get_total_flops())


def _product_flops(total: Shape, first: Shape, second: Shape, *_: object, **__: object) -> int:
    """FLOPs of ``T += A B`` from the shapes of T, A and B."""
    return 2 * torch.Size(first).numel() * second[-1]


#: Products in place, which torch's counter does not know.
_IN_PLACE = {torch.ops.aten.baddbmm_: _product_flops, torch.ops.aten.addmm_: _product_flops}


def take(stacked: Tensor, positions: Sequence[int]) -> Tensor:
    """Selects rows of a stacked tensor, without a copy if they are neighbours in order."""
    first = positions[0] if positions else 0
    if list(positions) == list(range(first, first + len(positions))):
        return stacked[first : first + len(positions)]
    return stacked[list(positions)]


def _tensor_names(slot: str, form: type[Operator]) -> list[str]:
    return ['_'.join(filter(None, (slot, suffix))) for suffix in form.suffixes]


def _saved_forms(outline: Operators, tensors: Mapping[str, Tensor]) -> dict[str, type[Operator]]:
    """Operator type of each slot's saved tensors; the outline's own type if none matches."""
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
    # Row-major like a loaded state, so that products round equally before and after a resume.
    merged = torch.where(mask, new, take(old, positions)).contiguous()
    if len(positions) == len(old):
        return merged
    old[list(positions)] = merged
    return old


def _layer_shape(stacked: Tensor) -> Shape:
    blocks, height, width = stacked.shape[1:]
    return blocks, height, width
