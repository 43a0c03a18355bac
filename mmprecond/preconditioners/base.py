"""The contract of a preconditioner: settings and pure functions of stacks of matrices.

A method keeps no state. Statistics, operators and counters live in `core.LayerStack`, so that
failures, checkpoints and the batching over layers are written once for all methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_number
from ..curvature import (
    ALL,
    AttentionReading,
    Blocks,
    Factor,
    Form,
    Layer,
    Moment,
    RunningAverage,
    SampledRows,
    Side,
    Sketch,
    Statistic,
)
from ..linalg import Operators, RankSearch, count_flops


class RefreshError(RuntimeError):
    """A layer's refresh failed too often in a row."""


#: Running statistics by the side that they are of.
Factors = Mapping[Side, Factor]

#: Literal settings of codes that know neither limits of size nor shares of the rows.
WHOLE_LAYERS: dict[str, Any] = dict(max_dim=8192, oversize='skip', max_rank=None, max_rows=None)

OVERSIZE = ('skip', 'one_sided', 'block', 'lowrank')


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

    #: Statistics that the method keeps of a linear layer or convolution.
    statistics: ClassVar[tuple[Statistic, ...]] = ()
    #: The settings of its source, by which published numbers were made.
    published: ClassVar[dict[str, Any]] = {}
    #: Names of the rules that the method works with; none means all.
    rules: ClassVar[tuple[str, ...]] = ()
    #: Steps are counted from here when intervals fall due: 0 captures and refreshes at once.
    phase: ClassVar[int] = 0
    #: Whether a layer whose first statistics come late is refreshed at once.
    refresh_on_first_sample: ClassVar[bool] = True
    #: Whether its one statistic is put in at the start, and never captured.
    precomputed: ClassVar[bool] = False
    #: Whether the rule works in the space of `apply`, from which `restore` leads back. The rule
    #: must then treat each entry by itself.
    rotates: ClassVar[bool] = False
    #: Whether `restore` changes the rule's updates.
    acts_after_rule: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ('stat_interval', 'refresh_interval', 'max_dim'):
            check_count(name, getattr(self, name))
        for name in ('max_rank', 'max_rows'):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_choice('oversize', self.oversize, OVERSIZE)
        if self.rotates and self._oversize_form is not None:
            raise ValueError(
                f'oversize={self.oversize!r} is for inverses; {type(self).__name__} '
                "turns gradients, and takes 'skip' or 'one_sided'"
            )
        if self.refresh_interval % self.stat_interval:
            raise ValueError(
                f'refresh_interval={self.refresh_interval} must be a multiple of '
                f'stat_interval={self.stat_interval}'
            )

    @classmethod
    def options(cls) -> list[str]:
        """Names of the settings."""
        return [field.name for field in fields(cls)]

    # ---------------------------------------------------------------- what it measures

    @property
    def attention_reading(self) -> AttentionReading | None:
        """Reading of attention modules as a whole; None takes their linear layers alone."""
        return None

    @property
    def capture_interval(self) -> int:
        """Steps between captures that serve a layer that has statistics."""
        return self.stat_interval

    @property
    def rank_search(self) -> RankSearch | None:
        """When operators come as columns whose number is found at a refresh; None: never."""
        return None

    def candidate_statistics(self, layer: Layer) -> tuple[Statistic, ...]:
        """The statistics that the method would keep of a layer, whatever their size."""
        return self.statistics

    def selected_statistics(self, layer: Layer) -> tuple[Statistic, ...]:
        """The statistics kept of a layer; none leaves it to the rule."""
        candidates = tuple(
            self._with_sampled_rows(layer, statistic)
            for statistic in self.candidate_statistics(layer)
        )
        large = {statistic for statistic in candidates if self._is_large(layer, statistic)}
        form = self._oversize_form
        if form and (layer.compressible or not large):
            return tuple(
                statistic.in_form(form)
                if statistic in large and isinstance(statistic.form, Moment)
                else statistic
                for statistic in candidates
            )
        small = tuple(statistic for statistic in candidates if statistic not in large)
        return small if not large or self.oversize == 'one_sided' else ()

    def must_be_nonzero(self, layer: Layer) -> tuple[Statistic, ...]:
        """The statistics without which a sample tells nothing."""
        return self.selected_statistics(layer)

    def gradient_factor(self, rows: float) -> float:
        """Factor of the sums of squared gradient rows, given the number of rows.

        The rows are those of the gradient of the step's mean loss.
        """
        return 1.0

    def reads_weight(self, layer: Layer) -> bool:
        """True if `refresh` also takes the layers' weights (k, b, o, i), as side `WEIGHT`."""
        return False

    @property
    def _oversize_form(self) -> Form | None:
        """Replacement for moments above max_dim; None: none."""
        forms: dict[str, Form] = {
            'block': Blocks(self.max_dim),
            'lowrank': Sketch(self.max_rank or Sketch.rank),
        }
        return forms.get(self.oversize)

    def _with_sampled_rows(self, layer: Layer, statistic: Statistic) -> Statistic:
        """The statistic over `max_rows` rows, where the layer can draw some."""
        sampled = SampledRows(most_rows=self.max_rows)
        if (
            self.max_rows is None
            or statistic.rows != ALL
            or statistic.form.is_bounded
            or not statistic.form.is_product
            or not isinstance(sampled, layer.row_kinds)
        ):
            return statistic
        return statistic.over(sampled)

    def _is_large(self, layer: Layer, statistic: Statistic) -> bool:
        widths = [width for _, _, width in layer.shapes(statistic).values()]
        return not statistic.form.is_bounded and max(widths) > self.max_dim

    # ---------------------------------------------------------------- costs and notes

    def outline(self, layer: Layer) -> Operators:
        """The operators of one layer in likely shapes, on the meta device."""
        return {
            statistic.side.name: statistic.form.outline(
                *layer.size_of(statistic.side), layer, self.rank_search
            )
            for statistic in self.selected_statistics(layer)
        }

    def apply_flops(self, layer: Layer) -> float:
        """Floating-point operations of one step's products with a layer's gradient."""
        gradient = torch.empty(1, *layer.shape, device='meta')
        operators = self.outline(layer)
        total = count_flops(self.apply, operators, gradient)
        return total + (count_flops(self.restore, operators, gradient) if self.rotates else 0.0)

    def refresh_flops(self, layer: Layer) -> float:
        """About the operations of one refresh: n^3 for each factor."""
        return sum(
            float(b * n * m * m)
            for statistic in self.selected_statistics(layer)
            for b, n, m in layer.shapes(statistic).values()
        )

    @property
    def moves_moments(self) -> bool:
        """True if the rule's moments follow where `align` turns the space of `apply`."""
        return False

    @property
    def is_inverse(self) -> bool:
        """True if its dense operators are inverses of damped moments."""
        return False

    def note(self, layer: Layer) -> str:
        """Addition to the method's name in the table, such as a side that is left out; or ''."""
        selected = self.selected_statistics(layer)
        if len(selected) < len(self.candidate_statistics(layer)):
            return f'one side: the other is over max_dim={self.max_dim}'
        notes = (
            (statistic.side.name, statistic.form.note(layer.size_of(statistic.side)[1]))
            for statistic in selected
        )
        return ', '.join(f'{side} side {note}' for side, note in notes if note)

    # ---------------------------------------------------------------- the method itself

    def is_exact(self, refreshes: int) -> bool:
        """True if a layer's refresh number `refreshes` (from 0) starts from nothing."""
        return True

    @abstractmethod
    def average(self) -> RunningAverage:
        """Rule by which samples merge into the running statistics."""

    @abstractmethod
    def refresh(
        self, factors: Factors, previous: Operators | None, damping: Tensor | float | None
    ) -> tuple[Operators, Tensor]:
        """Turns statistics into operators.

        Args:
            factors: Running statistics by side.
            previous: The operators of the last refresh, or None for an exact refresh.
            damping: Damping for these layers (k, 1) where some layers override the setting, else
                None.

        Returns:
            Operators by slot, and a bool tensor (k,) that is False where a refresh failed.
        """

    @property
    def clip(self) -> float | None:
        """Bound of the KL clip that is taken over all layers, or None."""
        return None

    def align(self, operators: Operators, previous: Operators | None) -> Operators:
        """New operators in the form closest to the previous ones, where they have a choice."""
        return operators

    @abstractmethod
    def apply(self, operators: Operators, gradients: Tensor) -> Tensor:
        """Preconditions gradients (k, b, o, i): the rule's directions."""

    def restore(self, operators: Operators, updates: Tensor) -> Tensor:
        """Turns the rule's updates (k, b, o, i) back; only of methods that act after the rule."""
        return updates


@dataclass(frozen=True, kw_only=True)
class InversePreconditioner(Preconditioner):
    """One whose operators are negative powers of damped moments, by a choice of solvers.

    Attributes:
        solver: 'lowrank' keeps of a side's power the eigenvectors that stand out of the damping,
            where they are fewer than half (see `RankSearch`); the others are the method's own.
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
    def rank_search(self) -> RankSearch | None:
        """With solver='lowrank'."""
        return RankSearch(self.tolerance, self.max_rank) if self.solver == 'lowrank' else None

    def is_exact(self, refreshes: int) -> bool:
        """All but those of low rank, which start from the last."""
        return self.solver != 'lowrank' or refreshes == 0


def check_statistics(owner: str, statistics: Any) -> None:
    """Raises TypeError or ValueError unless these are statistics that go together.

    Args:
        owner: The preconditioner's name.
        statistics: A tuple of statistics: of different sides, over the same rows.
    """
    if not isinstance(statistics, (tuple, list)):
        raise TypeError(
            f'{owner}: statistics={statistics!r} is no tuple; write (Statistic(INPUT, Moment()),)'
        )
    wrong = [item for item in statistics if not isinstance(item, Statistic)]
    if wrong:
        raise TypeError(
            f'{owner} asks for {wrong[0]!r}, which is no Statistic; write '
            'Statistic(INPUT, Moment()) or alike'
        )
    sides = [item.side for item in statistics]
    if len(set(sides)) < len(sides) or len({item.key for item in statistics}) < len(sides):
        raise ValueError(
            f'{owner} asks for two statistics of one side or name: '
            f'{", ".join(item.key for item in statistics)}'
        )
    if len({item.rows for item in statistics if item.form.is_product}) > 1:
        raise ValueError(
            f'{owner} asks for statistics over different rows: '
            f'{", ".join(item.key for item in statistics)}'
        )


def damping_like(value: Tensor | float, like: Tensor) -> Tensor:
    """An absolute damping, for all layers or one for each, in the form (k or 1, 1, 1, 1)."""
    amount = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return amount.reshape(-1, 1, 1, 1)


def check_damping(name: str, value: float) -> None:
    """Raises ValueError unless a damping is a positive number."""
    check_number(name, value, open_low=True)
