"""Contract of a preconditioner: settings and pure functions of stacks of matrices.

A method keeps no state. Statistics, operators and counters live in `core.LayerStack`. Failures,
checkpoints and batches of layers are therefore implemented once for all methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import PlainNumbers, check_choice, check_count, check_flag, check_number
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


#: Running statistics by side.
Factors = Mapping[Side, Factor]

#: Published settings of methods whose code has no size limits and takes all rows.
WHOLE_LAYERS: dict[str, Any] = dict(
    count_from=0,
    early_refreshes=False,
    warm_up=False,
    max_dim=None,
    oversize='skip',
    max_rank=None,
    max_rows=None,
)

OVERSIZE = ('skip', 'one_sided', 'block', 'lowrank')


@dataclass(frozen=True, kw_only=True)
class Preconditioner(PlainNumbers, ABC):
    """One method with its settings. Shapes: k layers, b blocks, gradient matrices o x i.

    Attributes:
        stat_interval: Steps between captures. Step t (from 0) captures if
            (t + count_from) % stat_interval == 0.
        refresh_interval: Steps between refreshes, counted in the same way; a multiple of
            `stat_interval`.
        count_from: Number of the first step in the count of intervals. From 0 (default), the first
            step captures, and a layer is refreshed as soon as it has statistics. From 1, as in
            algorithms that run t = 1, ..., T, the first capture comes at step `stat_interval` and
            the first refresh at step `refresh_interval` (with ``early_refreshes=False``).
        early_refreshes: Whether captures and refreshes also come at counts 1, 2, 4, 8, ... within
            the first `refresh_interval` steps, while statistics of random weights change fast.
        warm_up: Whether preconditioning follows a warm-up of the learning rate (default: True). Let
            s be the largest share of `initial_lr` that the rate has reached so far, from 0.01 to 1.
            A scheduler writes `initial_lr`, or OneCycleLR `max_lr`, into the parameter groups;
            without them, and once the rate has fallen by a tenth, s is 1. Refreshes divide the
            damping by s^2. Directions d that would get the gradient's norm are lengthened until
            ``<d, g> = |g|^2``, to at most |g| / s. Small steps then go along the gradient g, as
            those of the implicit step ``(lr A + I)^-1 g`` do.
        max_dim: Largest side of a factor; None for no limit. A matrix of side 8192 takes 268 MB in
            float32.
        oversize: Treatment of a layer with a larger side. 'skip' gives the layer to the plain
            rule. 'one_sided' leaves the larger side alone and preconditions the other. 'block'
            keeps the factor of that side in diagonal blocks of at most `max_dim`. 'lowrank' keeps
            `max_rank` eigenvectors from a random sketch, and the damping for the rest. The last
            two skip attention modules and grouped convolutions.
        max_rank: Most columns that represent a side: the rank of oversize='lowrank' (default 256),
            and the largest rank of solver='lowrank' (default: as many as the tolerance needs).
        max_rows: Most rows that a capture takes from one call of a convolution or a layer on
            tokens. It draws equally many random positions of each sample, at least one, and
            scales the sums to all rows, so that the statistics are unbiased. Output gradients are
            drawn by size, because a detector's are zero at most positions. None takes all rows. Of
            separable sides, kernel positions alone are sampled, by images and channels.
        given: Names of the settings that the user gave. No setting itself.
    """

    stat_interval: int = 20
    refresh_interval: int = 200
    count_from: int = 0
    early_refreshes: bool = True
    warm_up: bool = True
    max_dim: int | None = 8192
    oversize: str = 'skip'
    max_rank: int | None = None
    max_rows: int | None = None
    given: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    #: Name of the method in the literature, which `layers` and `precondition` take.
    word: ClassVar[str] = ''
    #: Further words, for forms of the method that have names of their own, with their settings. The
    #: first setting tells the form.
    variants: ClassVar[dict[str, dict[str, Any]]] = {}
    #: Statistics that the method keeps of a linear layer or convolution.
    statistics: ClassVar[tuple[Statistic, ...]] = ()
    #: Settings of the method's source, which its published numbers were made with.
    published: ClassVar[dict[str, Any]] = {}
    #: Names of the rules that the method works with; an empty tuple means all.
    rules: ClassVar[tuple[str, ...]] = ()
    #: Possible values of `count_from`.
    first_counts: ClassVar[tuple[int, ...]] = (0, 1)
    #: Whether the method's only statistic is given at the start and never captured.
    precomputed: ClassVar[bool] = False
    #: Whether a bias is one more column of its layer's matrix; otherwise it takes the plain rule.
    joins_bias: ClassVar[bool] = True
    #: Whether the rule works in a rotated space: `apply` leads into it, `restore` leads back. The
    #: rule must then be elementwise.
    rotates: ClassVar[bool] = False
    #: Whether a step's statistics count from the next step on, so that no direction depends on an
    #: operator of its own gradient. For statistics of the gradient matrix.
    counts_later: ClassVar[bool] = False
    #: Whether a layer makes no update in the step of its first statistics, if they count later.
    waits: ClassVar[bool] = False
    #: Whether `restore` changes the rule's updates.
    acts_after_rule: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ('stat_interval', 'refresh_interval'):
            check_count(name, getattr(self, name))
        for name in ('max_dim', 'max_rank', 'max_rows'):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_count('count_from', self.count_from, low=min(self.first_counts))
        if self.count_from not in self.first_counts:
            choices = ' or '.join(map(str, self.first_counts))
            raise ValueError(f'count_from={self.count_from!r} is unknown; choose {choices}')
        check_flag('early_refreshes', self.early_refreshes)
        check_flag('warm_up', self.warm_up)
        check_choice('oversize', self.oversize, OVERSIZE)
        if self.max_dim is None and self.oversize != 'skip':
            raise ValueError(
                f'oversize={self.oversize!r} has no effect without a limit; give max_dim a number'
            )
        if self.rotates and self._oversize_form is not None:
            raise ValueError(
                f'oversize={self.oversize!r} is for inverses; {type(self).__name__} '
                "rotates gradients; choose 'skip' or 'one_sided'"
            )
        if self.refresh_interval % self.stat_interval:
            raise ValueError(
                f'refresh_interval={self.refresh_interval} must be a multiple of '
                f'stat_interval={self.stat_interval}'
            )

    @classmethod
    def options(cls) -> list[str]:
        """Names of the settings."""
        return [setting.name for setting in fields(cls) if setting.name != 'given']

    # ---------------------------------------------------------------- statistics

    @property
    def attention_reading(self) -> AttentionReading | None:
        """Reading of attention modules as a whole; None treats their linear layers one by one."""
        return None

    @property
    def refresh_on_first_sample(self) -> bool:
        """True if a layer is refreshed as soon as it has its first statistics."""
        return self.count_from <= 0

    def is_early(self, count: int) -> bool:
        """True if a capture and a refresh are due at this count even if no interval divides it.

        With `early_refreshes` these are 1, 2, 4, 8, ... within the first `refresh_interval` steps.
        """
        power_of_two = count > 0 and count & (count - 1) == 0
        return self.early_refreshes and power_of_two and count < self.refresh_interval

    def warmed(self, damping: float, reached: float) -> float:
        """Damping while the learning rate has reached a share of its target (see `warm_up`)."""
        return damping / reached**2 if self.warm_up else damping

    @property
    def capture_interval(self) -> int:
        """Steps between captures of a layer that already has statistics."""
        return self.stat_interval

    @property
    def rank_search(self) -> RankSearch | None:
        """Search for the rank of low-rank operators at a refresh, or None for no search."""
        return None

    def candidate_statistics(self, layer: Layer) -> tuple[Statistic, ...]:
        """Statistics that the method would keep for a layer if size did not matter."""
        return self.statistics

    def selected_statistics(self, layer: Layer) -> tuple[Statistic, ...]:
        """Statistics kept for a layer; an empty tuple leaves the layer to the plain rule."""
        candidates = tuple(
            self._with_sampled_rows(layer, self._with_input_factor(layer, statistic))
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

    def exclusion_setting(self, layer: Layer) -> str:
        """Setting that excludes a layer from the method, or ''."""
        return ''

    def must_be_nonzero(self, layer: Layer) -> tuple[Statistic, ...]:
        """Statistics that must be nonzero for a sample to count."""
        return self.selected_statistics(layer)

    def gradient_factor(self, rows: float) -> float:
        """Factor of the sums of squared gradient rows, given the number of rows.

        The rows are gradients of the step's mean loss.
        """
        return 1.0

    def reads_weight(self, layer: Layer) -> bool:
        """True if `refresh` also takes the layers' weights (k, b, o, i), as side `WEIGHT`."""
        return False

    @property
    def _oversize_form(self) -> Form | None:
        """Form that replaces moments above max_dim, or None."""
        if self.oversize == 'lowrank':
            return Sketch(self.max_rank or Sketch.rank)
        return Blocks(self.max_dim) if self.oversize == 'block' and self.max_dim else None

    def _with_input_factor(self, layer: Layer, statistic: Statistic) -> Statistic:
        """The statistic in the form that the method prefers for patches."""
        return statistic

    def _with_sampled_rows(self, layer: Layer, statistic: Statistic) -> Statistic:
        """The statistic over at most `max_rows` random rows, if the layer can draw rows."""
        by_size = statistic.side.of_gradient  # of a detector, most gradient rows are zero
        sampled = SampledRows(most_rows=self.max_rows, by_size=by_size)
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
        if self.max_dim is None or statistic.form.is_bounded:
            return False
        return max(widths) > self.max_dim

    # ---------------------------------------------------------------- costs and notes

    def with_gradient_source(self) -> Preconditioner | None:
        """The method on statistics of the gradient matrix, or None if it has no such form."""
        return None

    @property
    def title(self) -> str:
        """The word of the method or its form; without one of its own, the name of its class."""
        own = vars(type(self))
        for word, settings in own.get('variants', {}).items():
            name, value = next(iter(settings.items()))
            if getattr(self, name) == value:
                return word
        return own.get('word') or type(self).__name__

    def outline(self, layer: Layer) -> Operators:
        """The operators of one layer in likely shapes, on the meta device."""
        return {
            statistic.side.name: statistic.form.outline(
                *layer.size_of(statistic.side), layer, self.rank_search
            )
            for statistic in self.selected_statistics(layer)
        }

    def apply_flops(self, layer: Layer) -> float:
        """FLOPs of the products with a layer's gradient in one step."""
        gradient = torch.empty(1, *layer.shape, device='meta')
        operators = self.outline(layer)
        total = count_flops(self.apply, operators, gradient)
        return total + (count_flops(self.restore, operators, gradient) if self.rotates else 0.0)

    def refresh_flops(self, layer: Layer) -> float:
        """Approximate FLOPs of one refresh: n^3 for each factor."""
        return sum(
            float(b * n * m * m)
            for statistic in self.selected_statistics(layer)
            for b, n, m in layer.shapes(statistic).values()
        )

    @property
    def moves_moments(self) -> bool:
        """True if the rule's moments are rotated when a refresh changes the basis."""
        return False

    def moves_squares(self, refreshes: int) -> bool:
        """True if second moments are rotated too, after some number of earlier refreshes."""
        return True

    @property
    def is_inverse(self) -> bool:
        """True if the method's dense operators are inverses of damped moments."""
        return False

    def note(self, layer: Layer) -> str:
        """Note beside the method's name in the layer table, such as an omitted side, or ''."""
        selected = self.selected_statistics(layer)
        if len(selected) < len(self.candidate_statistics(layer)):
            return f'one side: the other is over max_dim={self.max_dim}'
        notes = (
            (statistic.side.name, statistic.form.note(layer.size_of(statistic.side)[1]))
            for statistic in selected
        )
        return ', '.join(f'{side} side {note}' for side, note in notes if note)

    # ---------------------------------------------------------------- refresh and application

    def is_exact(self, refreshes: int) -> bool:
        """True if a layer's refresh number `refreshes` (from 0) starts from scratch."""
        return True

    @abstractmethod
    def average(self) -> RunningAverage:
        """Running average that merges samples into the statistics."""

    @abstractmethod
    def refresh(
        self, factors: Factors, previous: Operators | None, damping: Tensor | float | None
    ) -> tuple[Operators, Tensor]:
        """Turns statistics into operators.

        Args:
            factors: Running statistics by side.
            previous: The operators of the last refresh, or None for an exact refresh.
            damping: Damping of each layer (k, 1) if one of them overrides the setting, else None.

        Returns:
            Operators by slot, and a bool tensor (k,) that is False where a refresh failed.
        """

    @property
    def clip(self) -> float | None:
        """Bound of the KL clip over all layers, or None."""
        return None

    def align(self, operators: Operators, previous: Operators | None) -> Operators:
        """Returns the equivalent of the new operators that is closest to the previous ones."""
        return operators

    @abstractmethod
    def apply(self, operators: Operators, gradients: Tensor) -> Tensor:
        """Turns gradients (k, b, o, i) into the rule's directions."""

    def norm_parts(self, layer: Layer) -> int:
        """Number of equal parts of a layer's blocks whose directions get their gradients' norms.

        0: directions stay as `apply` made them. 1: the layer has one norm.
        """
        return 0

    def restore(self, operators: Operators, updates: Tensor) -> Tensor:
        """Transforms the rule's updates (k, b, o, i), for methods that act after the rule."""
        return updates


def damping_like(value: Tensor | float, like: Tensor) -> Tensor:
    """Absolute damping for all layers, or one for each, as a tensor (k or 1, 1, 1, 1)."""
    amount = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return amount.reshape(-1, 1, 1, 1)


def check_damping(name: str, value: float) -> None:
    """Raises ValueError unless a damping is a positive number."""
    check_number(name, value, open_low=True)
