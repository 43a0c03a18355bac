"""Nystroem preconditioners: G (R + rho I)^-1 from a random sketch of R."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..checks import check_choice, check_count, check_number
from ..curvature import SKETCH_KINDS, Layer, RunningAverage
from ..linalg import cholesky_inverse
from .base import Preconditioner, check_damping, damping_like
from .sides import Stacked, damped_sides, two_sided


@dataclass(frozen=True, kw_only=True)
class NystromFeature(Preconditioner):
    """NysAct: ``V = G (A + rho I)^-1`` with A the Nystroem approximation of R by few columns.

    Of R (i x i) the product Y = R Omega with a fixed matrix Omega (i x rank) is kept as a
    bias-corrected running average; ``A = Y (Omega' Y)^+ Y'``. A whole R is kept where rank is no
    less than i, and of grouped convolutions, whose blocks are small.

    Source: NysAct (arXiv 2506.08360). Against its code: Omega is drawn once a layer (which the code
    does at each capture, and then averages products with different ones), the core is inverted on
    its range rather than shifted, and nothing i x i is laid out.

    State: i rank numbers for the sketch and as many for the operator. A refresh costs about
    4 i rank^2 FLOPs, a step 4 o i rank.

    Attributes:
        stat_decay: Weight of the old statistic, in [0, 1).
        damping: rho, absolute.
        rank: Columns of the sketch.
        sketch: 'gaussian': Omega has normal entries; 'columns': it picks columns of R at random.
    """

    stat_interval: int = 5
    refresh_interval: int = 50
    stat_decay: float = 0.95
    damping: float = 1.
    rank: int = 10
    sketch: str = 'gaussian'

    requires: ClassVar[tuple[str, ...]] = ('input_sketch',)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number('stat_decay', self.stat_decay, high=1)
        check_damping('damping', self.damping)
        check_count('rank', self.rank)
        check_choice('sketch', self.sketch, SKETCH_KINDS)

    @property
    def layer_options(self) -> dict[str, int | str | None]:
        """The sketch's width and kind."""
        return {**super().layer_options, 'rank': self.rank, 'sketch': self.sketch}

    def wanted(self, layer: Layer) -> tuple[str, ...]:
        """The sketch, or the moment where that is no larger or the only form."""
        whole = self.rank >= layer.columns or not layer.compressible
        return ('input_moment',) if whole else self.requires

    @property
    def is_inverse(self) -> bool:
        """They are."""
        return True

    def average(self) -> RunningAverage:
        """Moving average with bias correction."""
        return RunningAverage(self.stat_decay, corrected=True)

    def refresh(self, statistics: Stacked, previous: Stacked | None,
                damping: Tensor | float | None = None) -> tuple[Stacked, Tensor]:
        """Inverts; of columns their small side (see the base class)."""
        rho = self.damping if damping is None else damping
        return damped_sides(
            statistics,
            lambda _, given: damping_like(rho, given)[..., 0, 0].expand(given.shape[:2]),
            lambda _, damped: cholesky_inverse(damped))

    def apply(self, operator: Stacked, gradients: Tensor) -> Tensor:
        """``G (A + rho I)^-1``, not scaled."""
        return two_sided(operator, gradients)
