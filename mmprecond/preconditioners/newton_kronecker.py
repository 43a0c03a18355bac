"""Kronecker-factored preconditioners: L^-1 G R^-1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..checks import check_choice, check_count, check_flag, check_number
from ..curvature import (
    GRADIENT,
    INPUT,
    Factor,
    Layer,
    Moment,
    Power,
    RunningAverage,
    Side,
    Statistic,
)
from ..linalg import Operators, cholesky_inverse, definite_newton_inverse, newton_inverse
from .base import WHOLE_LAYERS, Factors, check_damping
from .inverse import InversePreconditioner
from .registry import register_preconditioner
from .two_sided import damped_powers, exact_relative_damping, two_sided

#: What a damping is relative to.
DAMPING_FORMS = ('relative', 'gradient')
#: Lengths of a Newton step.
STEP_SIZES = ('norm', 'optimal')


@register_preconditioner
@dataclass(frozen=True, kw_only=True)
class NewtonKronecker(InversePreconditioner):
    """NKFAC: ``V = L^-1 G R^-1``, scaled to the norm of G.

    R (i x i) and L (o x o) are running averages of the input and gradient second moments. Each
    capture is first divided by its Frobenius norm. The damping of a factor is
    max(damping_floor, damping * lambda_max).

    Source: thesis chapter 3, (3.4), (3.7), (3.9), Algorithms 2-4. Capture normalisation, damping
    floor and the schedule of exact inverses are those of the published code. The algorithms as
    printed have ``normalise=False, damping_floor=0, exact_start=True, solver='newton',
    early_refreshes=False``.

    State and cost of dense sides: 2 (o^2 + i^2) numbers per block. A refresh costs 4 n^3 FLOPs per
    Newton step and factor. A step costs 2 o i (o + i) FLOPs. The default forms keep far less (see
    `PatchPreconditioner` and `InversePreconditioner`).

    Attributes:
        stat_decay: Weight of the old statistic, in [0, 1).
        damping: Damping relative to a factor's largest eigenvalue.
        damping_form: 'relative' (default), or 'gradient': the damping starts at its setting, and is
            proportional to the gradient's norm and adapted from the loss (see
            `core.gradient_damping.GradientDamping`). The optimizer needs the loss of a step then.
        damping_floor: Least damping.
        normalise: Whether each capture is divided by its Frobenius norm.
        newton_steps: Newton steps per refresh.
        newton_step_size: Size of a Newton step where ``||B A - I||_F >= 1``. 'norm' is
            ``1 / ||B A||_F``. 'optimal' minimizes the residual (Proposition 3.2). If the result is
            not positive definite, an exact inverse replaces it, as directions could point uphill.
        exact_interval: A layer's refreshes 0, 1, 2 and every `exact_interval`-th one compute exact
            inverses (C in the thesis).
        exact_start: Whether each capture of the first 2 `refresh_interval` steps is followed by an
            exact inverse (Algorithm 3, line 6), for solver='newton'.
        solver: 'lowrank' (default) keeps the eigenvectors of a side that stand out from the
            damping, and computes exact inverses of short sides. 'newton' updates dense inverses by
            Newton steps, as published. 'cholesky' computes exact inverses at every refresh.
    """

    stat_decay: float = 0.95
    damping: float = 0.01
    damping_form: str = 'relative'
    damping_floor: float = 1e-4
    normalise: bool = True
    newton_steps: int = 1
    newton_step_size: str = 'norm'
    exact_interval: int = 500
    exact_start: bool = False
    solver: str = 'lowrank'
    max_rows: int | None = 512

    dense_solvers: ClassVar[tuple[str, ...]] = ('newton', 'cholesky')
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic(INPUT, Moment()),
        Statistic(GRADIENT, Moment()),
    )

    word: ClassVar[str] = 'NKFAC'
    #: Thesis chapter 3 and its code.
    published: ClassVar[dict[str, Any]] = dict(
        stat_interval=20,
        refresh_interval=200,
        stat_decay=0.95,
        damping=0.01,
        damping_form='relative',
        damping_floor=1e-4,
        normalise=True,
        newton_steps=1,
        newton_step_size='norm',
        exact_interval=500,
        exact_start=False,
        solver='newton',
        input_factor='patch',
        source='activation',
        **WHOLE_LAYERS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number('stat_decay', self.stat_decay, high=1)
        check_damping('damping', self.damping)
        check_choice('damping_form', self.damping_form, DAMPING_FORMS)
        check_number('damping_floor', self.damping_floor)
        check_count('newton_steps', self.newton_steps)
        check_count('exact_interval', self.exact_interval)
        check_flag('normalise', self.normalise)
        check_choice('newton_step_size', self.newton_step_size, STEP_SIZES)
        check_flag('exact_start', self.exact_start)
        if self.newton_step_size == 'optimal' and self.solver != 'newton':
            raise ValueError("newton_step_size='optimal' is for solver='newton'; set both")
        if self.exact_start and (self.solver != 'newton' or self.early_refreshes):
            raise ValueError(
                "exact_start=True is for solver='newton' and early_refreshes=False; set both"
            )

    def is_early(self, count: int) -> bool:
        """True also for the captures of the first 2 `refresh_interval` steps with `exact_start`."""
        start = self.exact_start and self.count_from <= count < 2 * self.refresh_interval
        return start and count % self.stat_interval == 0 or super().is_early(count)

    def is_exact(self, refreshes: int) -> bool:
        """True if a refresh computes exact inverses.

        For 'newton' these are refreshes 0, 1, 2 and every `exact_interval`-th. With `exact_start`
        they are all of the first 2 `refresh_interval` steps, and every `exact_interval`-th later.
        """
        if self.solver != 'newton':
            return super().is_exact(refreshes)
        if not self.exact_start:
            return refreshes <= 2 or refreshes % self.exact_interval == 0
        start = 2 * (self.refresh_interval // self.stat_interval) - self.count_from
        return refreshes < start or (refreshes - start + 2) % self.exact_interval == 0

    @property
    def is_inverse(self) -> bool:
        """Dense operators are inverses of damped moments."""
        return True

    def average(self) -> RunningAverage:
        """Moving average of the captures, normalised with `normalise`."""
        return RunningAverage(self.stat_decay, normalise='norm' if self.normalise else '')

    def refresh(
        self, factors: Factors, previous: Operators | None, damping: Tensor | float | None = None
    ) -> tuple[Operators, Tensor]:
        """Inverts the damped factors (see the base class)."""
        damping = self.damping if damping is None else damping

        def amount(side: Side, factor: Factor) -> Tensor:
            if self.damping_floor == 0:  # a block of zeros must have some damping too
                return exact_relative_damping(factor, damping)
            return (damping * factor.largest_eigenvalue()).clamp_min(self.damping_floor)

        def invert(damped: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
            if last is None or self.solver == 'lowrank':
                return cholesky_inverse(damped)
            if self.newton_step_size == 'norm':
                return newton_inverse(damped, last, self.newton_steps)
            return definite_newton_inverse(damped, last, self.newton_steps)

        return damped_powers(factors, amount, Power(invert, search=self.rank_search), previous)

    def apply(self, operators: Operators, gradients: Tensor) -> Tensor:
        """``L^-1 G R^-1``; a side without an operator is left alone."""
        return two_sided(operators, gradients)

    def norm_parts(self, layer: Layer) -> int:
        """One norm for the layer."""
        return 1
