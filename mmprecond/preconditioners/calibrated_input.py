"""MAC's first layer: exact inverse of a second moment that is given once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..curvature import INPUT, Moment, RunningAverage, Statistic
from ..linalg import Dense, Operators, add_to_diagonal, cholesky_inverse
from .base import Factors, Preconditioner, damping_like
from .two_sided import two_sided


@dataclass(frozen=True, kw_only=True)
class CalibratedInput(Preconditioner):
    """``G (R + rho I)^-1 rho`` with the second moment R of a layer's inputs, given once.

    MAC takes it for the first layer. The inputs of that layer are the images, which do not change
    during training. 'official' omits the factor rho, so that the layer's direction is divided by
    rho in comparison with other layers.

    Source: as `ActivationMean`.

    Attributes:
        damping: rho, absolute.
        compat: 'paper' or 'official'.
    """

    damping: float = 1.0
    compat: str = 'paper'
    warm_up: bool = False  # its only refresh comes while the rate is lowest

    statistics: ClassVar[tuple[Statistic, ...]] = (Statistic(INPUT, Moment()),)
    precomputed: ClassVar[bool] = True

    def average(self) -> RunningAverage:
        """Plain mean, here of the only sample."""
        return RunningAverage(decay=None)

    def refresh(
        self, factors: Factors, previous: Operators | None, damping: Tensor | float | None = None
    ) -> tuple[Operators, Tensor]:
        """The exact inverse (see the base class)."""
        moment = factors[INPUT].tensor
        rho = damping_like(self.damping if damping is None else damping, moment)
        inverse, succeeded = cholesky_inverse(add_to_diagonal(moment, rho[..., 0, 0]))
        if self.compat == 'paper':
            inverse = inverse * rho
        return {INPUT.name: Dense(inverse)}, succeeded.all(-1)

    def apply(self, operators: Operators, gradients: Tensor) -> Tensor:
        """``G`` times the inverse."""
        return two_sided(operators, gradients)
