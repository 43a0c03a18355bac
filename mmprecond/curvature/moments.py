"""Forms of a side's second moment: dense, diagonal blocks, columns, or a random sketch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_count
from ..linalg import (
    BlockDiagonal,
    Dense,
    LowRank,
    Operator,
    RankSearch,
    Shape,
    add_product,
    add_to_diagonal,
    largest_eigenvalue,
    largest_eigenvalue_of_columns,
    low_rank_power,
    nystrom_columns,
    power_of_columns,
    stacked_product,
    trace,
)
from .form import Factor, Form, Power, Slots
from .gram import gram, gram_flops

if TYPE_CHECKING:
    from .layer import Layer
    from .rows import LayerRows

#: Kinds of a sketch's test matrix: normal numbers, or columns of the identity.
SKETCH_KINDS = ('gaussian', 'columns')


@dataclass(frozen=True)
class Moment(Form):
    """Dense second moment ``sum x'x`` (b, n, n)."""

    suffix: ClassVar[str] = 'moment'

    def shapes(self, blocks: int, size: int) -> tuple[Shape, ...]:
        return ((blocks, size, size),)

    def measure(self, rows: LayerRows) -> tuple[Tensor, ...]:
        return (rows.moment(),)

    def measure_flops(self, rows: int, blocks: int, size: int, width: int) -> float:
        return blocks * gram_flops(size, rows)

    def outline(self, blocks: int, size: int, layer: Layer, search: RankSearch | None) -> Operator:
        if search is not None and search.takes(size):
            return LowRank.outline((blocks, size, search.usual(size)), (layer.blocks, 1, 1))
        return Dense.outline((blocks, size, size))

    def trace(self, factor: Factor) -> Tensor:
        return trace(factor.tensor)

    def largest_eigenvalue(self, factor: Factor) -> Tensor:
        return largest_eigenvalue(factor.tensor)

    def damped_power(
        self,
        factor: Factor,
        amount: Callable[[Factor], Tensor],
        power: Power,
        previous: Operator | None,
    ) -> tuple[Operator, Tensor]:
        """Low-rank power if the search finds few columns; a dense operator stays dense."""
        dense = previous if isinstance(previous, Dense) else None
        search = power.search
        if search is not None and search.takes(factor.tensor.shape[-1]) and dense is None:
            start = previous.columns if isinstance(previous, LowRank) else None
            low_rank = low_rank_power(
                factor.tensor,
                start,
                lambda columns: amount(Factor(_COLUMNS, (columns,))),
                power.exponent,
                search.tolerance,
                search.limit(factor.tensor.shape[-1]),
            )
            if low_rank is not None:
                return LowRank(*low_rank[:2]), low_rank[2]
        matrix, succeeded = power.solve(
            add_to_diagonal(factor.tensor, amount(factor)), dense.matrix if dense else None
        )
        return Dense(matrix), succeeded


@dataclass(frozen=True)
class Blocks(Form):
    """Diagonal blocks of the second moment of a layer with one block (count, m, m).

    Attributes:
        most: Largest m. The side is cut into the least number of blocks, all of equal size.
    """

    suffix: ClassVar[str] = 'blocks'
    most: int = 8192

    def __post_init__(self) -> None:
        check_count('most', self.most)

    def shapes(self, blocks: int, size: int) -> tuple[Shape, ...]:
        count = -(-size // self.most)
        height = -(-size // count)
        return ((count, height, height),)

    def measure(self, rows: LayerRows) -> tuple[Tensor, ...]:
        total = rows.unwritten(self)
        return (gram((_pad_to_blocks(chunk, total) for chunk in rows.chunks()), total),)

    def measure_flops(self, rows: int, blocks: int, size: int, width: int) -> float:
        return blocks * gram_flops(size, rows)

    def norm(self, samples: Sequence[Tensor], sizes: Sequence[float] | None) -> Tensor | float:
        """One norm for all blocks, because they belong to one matrix."""
        if sizes:
            return sizes[0]
        return torch.linalg.vector_norm(torch.linalg.matrix_norm(samples[0]))

    def note(self, size: int) -> str:
        return f'in blocks of {self.shapes(1, size)[0][-1]}'

    def outline(self, blocks: int, size: int, layer: Layer, search: RankSearch | None) -> Operator:
        return BlockDiagonal.outline(*self.shapes(blocks, size))

    def trace(self, factor: Factor) -> Tensor:
        return trace(factor.tensor)

    def largest_eigenvalue(self, factor: Factor) -> Tensor:
        """Largest eigenvalue of the whole side for each block, so that all have one damping."""
        values = largest_eigenvalue(factor.tensor)
        return values.amax(-1, keepdim=True).expand_as(values)

    def damped_power(
        self,
        factor: Factor,
        amount: Callable[[Factor], Tensor],
        power: Power,
        previous: Operator | None,
    ) -> tuple[Operator, Tensor]:
        last = previous.blocks if isinstance(previous, BlockDiagonal) else None
        blocks, succeeded = power.solve(add_to_diagonal(factor.tensor, amount(factor)), last)
        return BlockDiagonal(blocks), succeeded


class _ColumnForm(Form):
    """Columns A (b, n, m), once finalized, with A A' close to the second moment."""

    def outline(self, blocks: int, size: int, layer: Layer, search: RankSearch | None) -> Operator:
        return LowRank.outline(*self.shapes(blocks, size), (layer.blocks, 1, 1))

    def trace(self, factor: Factor) -> Tensor:
        return factor.tensor.square().sum((-2, -1))

    def largest_eigenvalue(self, factor: Factor) -> Tensor:
        return largest_eigenvalue_of_columns(factor.tensor)

    def damped_power(
        self,
        factor: Factor,
        amount: Callable[[Factor], Tensor],
        power: Power,
        previous: Operator | None,
    ) -> tuple[Operator, Tensor]:
        columns, scale, succeeded = power_of_columns(factor.tensor, amount(factor), power.exponent)
        return LowRank(columns, scale), succeeded


@dataclass(frozen=True)
class Columns(_ColumnForm):
    """Rows themselves, stored as columns (b, n, slots).

    Once all slots are taken, further rows are added to others with random signs (a count sketch).
    The moment remains unbiased.

    Attributes:
        slots: Number of columns.
    """

    suffix: ClassVar[str] = 'columns'
    is_bounded: ClassVar[bool] = True
    is_placed: ClassVar[bool] = True
    slots: int = 256

    def __post_init__(self) -> None:
        check_count('slots', self.slots)

    def shapes(self, blocks: int, size: int) -> tuple[Shape, ...]:
        return ((blocks, size, self.slots),)

    def measure(self, rows: LayerRows) -> tuple[Tensor, ...]:
        return (torch.cat(list(rows.chunks()), 2),)

    def measure_flops(self, rows: int, blocks: int, size: int, width: int) -> float:
        return 0.0

    def stage(self, measured: Tensor, slots: Slots) -> Tensor:
        """Puts each of the columns (b, n, c) into the next slot."""
        count = measured.shape[2]
        places = slots.claim(count)
        signs = torch.randint(0, 2, (count,), generator=slots.generator, device='cpu') * 2.0 - 1
        empty = measured.new_zeros(*measured.shape[:2], slots.count)
        return empty.index_add_(2, places.to(measured.device), measured * signs.to(measured))

    def rescale(self, total: Tensor, factor: float) -> None:
        """Multiplies by the root of the factor, because the quantity is A A'."""
        total *= factor**0.5


#: Form for any number of columns.
_COLUMNS = Columns()


@dataclass(frozen=True)
class Sketch(_ColumnForm):
    """Second moment times a random test matrix Omega: ``sum x'x Omega`` (b, n, rank).

    Attributes:
        rank: Number of columns of Omega, at most n.
        kind: 'gaussian': Omega has normal entries of variance 1 / rank. 'columns': Omega has
            columns of the identity.
    """

    suffix: ClassVar[str] = 'sketch'
    rank: int = 256
    kind: str = 'gaussian'

    def __post_init__(self) -> None:
        check_count('rank', self.rank)
        check_choice('kind', self.kind, SKETCH_KINDS)

    def shapes(self, blocks: int, size: int) -> tuple[Shape, ...]:
        return ((blocks, size, min(self.rank, size)),)

    def measure(self, rows: LayerRows) -> tuple[Tensor, ...]:
        total = rows.unwritten(self).zero_()
        test = self.test_matrix(rows.layer, rows.key, total.shape[1])
        for chunk in rows.chunks():
            add_product(total, chunk, stacked_product(chunk.mT, test))
        return (total,)

    def measure_flops(self, rows: int, blocks: int, size: int, width: int) -> float:
        return 4.0 * blocks * size * width * rows

    def test_matrix(self, layer: Layer, key: str, size: int) -> Tensor:
        """Omega (1, n, rank), seeded by the layer's name: equal at all steps, ranks and devices."""
        generator = torch.Generator().manual_seed(layer.seed_of(key))
        rank = min(self.rank, size)
        if self.kind == 'columns':
            chosen = torch.randperm(size, generator=generator, device='cpu')[:rank]
            drawn = torch.zeros(1, size, rank, device='cpu')
            drawn[0, chosen, torch.arange(rank, device='cpu')] = 1
        else:
            drawn = (
                torch.randn(1, size, rank, generator=generator, dtype=torch.float32, device='cpu')
                / rank**0.5
            )
        return drawn.to(layer.weight.device, layer.working_dtype)

    def finalize(
        self, tensors: tuple[Tensor, ...], layers: Sequence[Layer], key: str
    ) -> tuple[Tensor, ...]:
        """Nystroem columns of the sketch."""
        (tensor,) = tensors
        test = torch.stack([self.test_matrix(layer, key, tensor.shape[-2]) for layer in layers])
        return (nystrom_columns(tensor, test.to(tensor.dtype)),)

    def note(self, size: int) -> str:
        return f'of rank {min(self.rank, size)}'


def _pad_to_blocks(rows: Tensor, like: Tensor) -> Tensor:
    """Cuts rows (1, n, r) into the blocks of `like` and pads the last one with zeros."""
    count, size, _ = like.shape
    padded = F.pad(rows, (0, 0, 0, count * size - rows.shape[1]))
    return padded.reshape(count, size, rows.shape[2])
