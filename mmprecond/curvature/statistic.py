"""Statistics: a side of a layer, a selection of its rows, and a form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from ..linalg.operators import Shape
    from .form import Form


@dataclass(frozen=True)
class Side:
    """Kind of rows of a layer: its input, the gradient of its output, or others that it declares.

    Attributes:
        name: Key of the side's operator, and prefix of its tensors' names.
        of_gradient: Whether the rows are gradients of the step's mean loss. Their products are
            summed; products of all other rows are averaged.
    """

    name: str
    of_gradient: bool = False


INPUT = Side('input')
GRADIENT = Side('gradient', of_gradient=True)
#: The layer's weight itself, handed to refreshes that read it.
WEIGHT = Side('weight')


@dataclass(frozen=True)
class Rows:
    """Selection of the rows of a side."""

    suffix: ClassVar[str] = ''


@dataclass(frozen=True)
class AllRows(Rows):
    """Every position of every sample."""


@dataclass(frozen=True)
class ReducedRows(Rows):
    """One row per sample: the mean input and the summed gradient of its positions."""

    suffix: ClassVar[str] = '_reduced'


@dataclass(frozen=True)
class SampledRows(Rows):
    """Random positions of each sample, drawn at each call and scaled to all positions.

    Attributes:
        positions: Number of positions of each sample.
        most_rows: Bound on the rows of all samples of a call, in place of `positions`. At least
            one position of each sample is drawn.
        by_size: Whether gradient rows are drawn by their size; otherwise all positions are alike.
    """

    suffix: ClassVar[str] = '_sampled'
    positions: int = 8
    most_rows: int | None = None
    by_size: bool = False

    def count(self, samples: int) -> int:
        """Number of positions to draw of each sample, given the number of samples."""
        if self.most_rows is None:
            return self.positions
        return max(1, self.most_rows // max(1, samples))


@dataclass(frozen=True)
class MatrixRows(Rows):
    """Rows of the gradient matrix G (o x i) that the optimizer's step sees.

    Those of the input side are its o rows, so that their products sum to G'G (i x i). Those of the
    gradient side are its i columns, so that theirs sum to GG' (o x o). No hook measures them.
    """

    suffix: ClassVar[str] = '_matrix'


ALL = AllRows()
REDUCED = ReducedRows()
MATRIX = MatrixRows()


@dataclass(frozen=True)
class Statistic:
    """One running quantity of a layer.

    Attributes:
        side: Side of the layer.
        form: Form in which the rows are summed.
        rows: Selection of the side's rows.
        key: Name of the statistic in checkpoints; default: ``<side>_<form><rows>``.
    """

    side: Side
    form: Form
    rows: Rows = ALL
    key: str = ''

    def __post_init__(self) -> None:
        for name, value in (('form', self.form), ('rows', self.rows)):
            if isinstance(value, type):
                raise TypeError(
                    f'{name}={value.__name__} is a class; write {name}={value.__name__}()'
                )
        if not isinstance(self.side, Side) or not isinstance(self.rows, Rows):
            raise TypeError(
                f'Statistic({self.side!r}, ..., rows={self.rows!r}) takes a Side, such '
                'as INPUT, and Rows, such as ALL'
            )
        if not self.key:
            name = f'{self.side.name}_{self.form.suffix}{self.rows.suffix}'
            object.__setattr__(self, 'key', name)

    def in_form(self, form: Form) -> Statistic:
        """The same rows of the same side in another form, under that form's name."""
        return Statistic(self.side, form, self.rows)

    def over(self, rows: Rows) -> Statistic:
        """The same form of the same side over other rows, under these rows' name."""
        return Statistic(self.side, self.form, rows)

    @property
    def of_matrix(self) -> bool:
        """True if the statistic is taken of the gradient matrix, in the optimizer's step."""
        return isinstance(self.rows, MatrixRows)

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the statistic's tensors."""
        return self.form.keys(self.key)

    def shapes(self, blocks: int, size: int) -> dict[str, Shape]:
        """Shapes (b, n, m) of the tensors by name, given the blocks and length of the side."""
        return dict(zip(self.keys, self.form.shapes(blocks, size), strict=True))
