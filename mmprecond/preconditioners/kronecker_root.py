"""AdaBK: L^-1/2 G R^-1/2."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from ..checks import check_count, check_number
from ..curvature import GRADIENT, INPUT, Layer, Moment, Power, RunningAverage, Statistic
from ..linalg import (
    Operators,
    inverse_power,
    newton_schulz_inverse_root,
    newton_schulz_inverse_root_of_values,
)
from .base import WHOLE_LAYERS, Factors, check_damping
from .inverse import InversePreconditioner
from .registry import register_preconditioner
from .two_sided import damped_powers, exact_relative_damping, two_sided

#: Least damping of 'lowrank'; almost all eigenvalues stand out from smaller dampings.
LEAST_LOWRANK_DAMPING = 1e-3


@register_preconditioner
@dataclass(frozen=True, kw_only=True)
class KroneckerRoot(InversePreconditioner):
    """AdaBK: ``V = L^-1/2 G R^-1/2``, scaled to the norm of G.

    R (i x i) and L (o x o) are running averages of the input and gradient second moments. The
    damping of each is damping * lambda_max.

    Source: AdaBK (CVPR 2023; a baseline in chapter 4 of the thesis). Averages and roots are those
    of its published code.

    State: 2 (o^2 + i^2) numbers per block. A refresh costs 6 n^3 FLOPs per Newton-Schulz step and
    factor. A step costs 2 o i (o + i) FLOPs.

    Attributes:
        stat_decay: Weight of the old statistic, in [0, 1).
        damping: Damping relative to a factor's largest eigenvalue.
        solver: 'newton_schulz', as published, which also bounds the inverse roots of small
            eigenvalues; 'eigh' for exact roots; or 'lowrank', for dampings of at least 0.001. The
            last keeps the eigenvectors of a side that stand out from the damping, if they are fewer
            than half. It computes exact roots of the other sides.
        root_steps: Newton-Schulz steps per refresh.
    """

    stat_interval: int = 200
    refresh_interval: int = 2000
    stat_decay: float = 0.9
    damping: float = 1e-5
    solver: str = 'newton_schulz'
    root_steps: int = 10

    dense_solvers: ClassVar[tuple[str, ...]] = ('newton_schulz', 'eigh')
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic(INPUT, Moment()),
        Statistic(GRADIENT, Moment()),
    )

    word: ClassVar[str] = 'AdaBK'
    #: AdaBK's code.
    published: ClassVar[dict[str, Any]] = dict(
        stat_interval=200,
        refresh_interval=2000,
        stat_decay=0.9,
        damping=1e-5,
        solver='newton_schulz',
        root_steps=10,
        input_factor='patch',
        source='activation',
        **WHOLE_LAYERS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number('stat_decay', self.stat_decay, high=1)
        check_damping('damping', self.damping)
        check_count('root_steps', self.root_steps)
        for setting, other in (('oversize', 'block'), ('solver', 'eigh')):
            if getattr(self, setting) == 'lowrank' and self.damping < LEAST_LOWRANK_DAMPING:
                raise ValueError(
                    f"{setting}='lowrank' leaves out eigenvalues that damping="
                    f'{self.damping} would not hide: set damping of at least '
                    f'{LEAST_LOWRANK_DAMPING}, or {setting}={other!r}'
                )

    def average(self) -> RunningAverage:
        """Moving average of the captures, without normalisation."""
        return RunningAverage(self.stat_decay)

    def refresh(
        self, factors: Factors, previous: Operators | None, damping: Tensor | float | None = None
    ) -> tuple[Operators, Tensor]:
        """Inverse roots of the damped factors (see the base class)."""
        damping = self.damping if damping is None else damping

        def root(damped: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
            if self.solver == 'newton_schulz':
                return newton_schulz_inverse_root(damped, self.root_steps)
            return inverse_power(damped, 0.5)

        spectrum = None
        if self.solver == 'newton_schulz':
            spectrum = partial(newton_schulz_inverse_root_of_values, steps=self.root_steps)
        return damped_powers(
            factors,
            lambda _, factor: exact_relative_damping(factor, damping),
            Power(root, 0.5, self.rank_search, spectrum),
            previous,
        )

    def apply(self, operators: Operators, gradients: Tensor) -> Tensor:
        """``L^-1/2 G R^-1/2``; a side without an operator is left alone."""
        return two_sided(operators, gradients)

    def norm_parts(self, layer: Layer) -> int:
        """One norm for the layer."""
        return 1
