"""Feature-space preconditioners: G R^-1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..checks import check_flag, check_number
from ..curvature import (
    INPUT,
    Factor,
    Layer,
    Moment,
    Power,
    RunningAverage,
    Statistic,
)
from ..linalg import Operators, add_to_diagonal, inverse_power
from .base import WHOLE_LAYERS, Factors, check_damping
from .inverse import InversePreconditioner
from .registry import register_preconditioner
from .two_sided import damped_powers, relative_damping, two_sided


@register_preconditioner
@dataclass(frozen=True, kw_only=True)
class InputFeature(InversePreconditioner):
    """FSGD: ``V = G R^-1``, scaled to the norm of G.

    R (i x i) is the running average of the input's second moment, damped by damping * lambda_max.
    Without damping, V is the least-squares solution for a gradient step on the layer's outputs: the
    change of the weight whose change of the outputs is closest to that step.

    Source: thesis 5.2.2, (5.1) and (5.2). `stat_decay` is the weight of the old statistic, where
    (5.18) prints the opposite. Exponent 0.5 is feature whitening (EFW, ECCV 2022).

    State and cost of a dense R: 2 i^2 numbers per block. A refresh costs i^3 FLOPs, a step costs
    2 o i^2 FLOPs.

    Attributes:
        stat_decay: Weight of the old statistic, in [0, 1).
        damping: Damping relative to the largest eigenvalue.
        exponent: p of ``G R^-p``; 0.5 for feature whitening.
        norm_recovery: Whether V is scaled to the norm of G.
        solver: 'lowrank' (default), which keeps the eigenvectors that stand out from the damping;
            or 'exact', as published.
    """

    stat_interval: int = 50
    refresh_interval: int = 500
    stat_decay: float = 0.95
    damping: float = 0.01
    exponent: float = 1.0
    norm_recovery: bool = True
    solver: str = 'lowrank'
    max_rows: int | None = 512

    dense_solvers: ClassVar[tuple[str, ...]] = ('exact',)
    statistics: ClassVar[tuple[Statistic, ...]] = (Statistic(INPUT, Moment()),)

    word: ClassVar[str] = 'FSGD'
    #: Thesis chapter 5.
    published: ClassVar[dict[str, Any]] = dict(
        stat_interval=50,
        refresh_interval=500,
        stat_decay=0.95,
        damping=0.01,
        exponent=1.0,
        norm_recovery=True,
        solver='exact',
        input_factor='patch',
        source='activation',
        **WHOLE_LAYERS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number('stat_decay', self.stat_decay, high=1)
        check_damping('damping', self.damping)
        check_number('exponent', self.exponent, open_low=True)
        if self.solver == 'lowrank' and self.exponent > 1:
            raise ValueError(
                f"exponent={self.exponent} amplifies the errors of solver='lowrank'; "
                "set solver='exact'"
            )
        check_flag('norm_recovery', self.norm_recovery)

    @property
    def is_inverse(self) -> bool:
        """Dense operators are inverses of damped moments at exponent 1."""
        return self.exponent == 1

    def average(self) -> RunningAverage:
        """Moving average of the captures, without normalisation."""
        return RunningAverage(self.stat_decay)

    def refresh(
        self,
        factors: Factors,
        previous: Operators | None = None,
        damping: Tensor | float | None = None,
    ) -> tuple[Operators, Tensor]:
        """Inverts the damped moments (see the base class)."""
        damping = self.damping if damping is None else damping
        power = Power(
            lambda damped, last: inverse_power(damped, self.exponent),
            self.exponent,
            self.rank_search,
        )
        return damped_powers(
            factors, lambda _, factor: relative_damping(factor, damping), power, previous
        )

    def apply(self, operators: Operators, gradients: Tensor) -> Tensor:
        """``G R^-p``."""
        return two_sided(operators, gradients)

    def norm_parts(self, layer: Layer) -> int:
        """One norm for the layer with `norm_recovery`."""
        return int(self.norm_recovery)


def damped_inverse(moment: Tensor, damping: Tensor | float) -> tuple[Tensor, Tensor]:
    """``(A + damping lambda_max(A) I)^-1`` of (..., b, n, n), and whether it succeeded."""
    amount = relative_damping(Factor(Moment(), (moment,)), damping)
    return inverse_power(add_to_diagonal(moment, amount), 1)
