"""Nystroem preconditioners: G (R + rho I)^-1 from a random sketch of R."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..checks import check_choice, check_count, check_number
from ..curvature import (
    INPUT,
    SKETCH_KINDS,
    Factor,
    Layer,
    Moment,
    Power,
    RunningAverage,
    Side,
    Sketch,
    Statistic,
)
from ..linalg import Operators, cholesky_inverse
from .base import WHOLE_LAYERS, Factors, Preconditioner, check_damping, damping_like
from .registry import register_preconditioner
from .two_sided import damped_powers, two_sided


@register_preconditioner
@dataclass(frozen=True, kw_only=True)
class NystromFeature(Preconditioner):
    """NysAct: ``V = G (A + rho I)^-1`` with A the Nystroem approximation of R by few columns.

    The statistic is the product Y = R Omega of R (i x i) and a fixed random matrix Omega
    (i x rank), as a bias-corrected running average; ``A = Y (Omega' Y)^+ Y'``. If rank is no less
    than i, the statistic is R itself. The same holds for grouped convolutions, whose blocks are
    small.

    Source: NysAct (arXiv 2506.08360), with three differences from its code. Omega is drawn once per
    layer; the code draws it at each capture and averages products with different matrices. The core
    is inverted on its range instead of shifted. No i x i matrix is formed.

    State: i rank numbers for the sketch and as many for the operator. A refresh costs about
    4 i rank^2 FLOPs, a step costs 4 o i rank FLOPs.

    Attributes:
        stat_decay: Weight of the old statistic, in [0, 1).
        damping: rho, absolute.
        rank: Columns of the sketch.
        sketch: 'gaussian': Omega has normal entries. 'columns': Omega selects random columns of R.
    """

    stat_interval: int = 5
    refresh_interval: int = 50
    stat_decay: float = 0.95
    damping: float = 1.0
    rank: int = 10
    sketch: str = 'gaussian'

    word: ClassVar[str] = 'NysAct'
    #: The authors' code.
    published: ClassVar[dict[str, Any]] = dict(
        stat_interval=5,
        refresh_interval=50,
        stat_decay=0.95,
        damping=1.0,
        rank=10,
        sketch='gaussian',
        **WHOLE_LAYERS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number('stat_decay', self.stat_decay, high=1)
        check_damping('damping', self.damping)
        check_count('rank', self.rank)
        check_choice('sketch', self.sketch, SKETCH_KINDS)

    def candidate_statistics(self, layer: Layer) -> tuple[Statistic, ...]:
        """Sketch, or the moment if that is no larger or the layer has no other form."""
        whole = self.rank >= layer.columns or not layer.compressible
        return (Statistic(INPUT, Moment() if whole else Sketch(self.rank, self.sketch)),)

    @property
    def is_inverse(self) -> bool:
        """Dense operators are inverses of damped moments."""
        return True

    def average(self) -> RunningAverage:
        """Moving average with bias correction."""
        return RunningAverage(self.stat_decay, corrected=True)

    def refresh(
        self, factors: Factors, previous: Operators | None, damping: Tensor | float | None = None
    ) -> tuple[Operators, Tensor]:
        """Inverts A + rho I, by the small side of the columns (see the base class)."""
        rho = self.damping if damping is None else damping

        def amount(side: Side, factor: Factor) -> Tensor:
            tensor = factor.tensor
            return damping_like(rho, tensor)[..., 0, 0].expand(tensor.shape[:2])

        return damped_powers(factors, amount, Power(lambda damped, _: cholesky_inverse(damped)))

    def apply(self, operators: Operators, gradients: Tensor) -> Tensor:
        """``G (A + rho I)^-1``, not scaled."""
        return two_sided(operators, gradients)
