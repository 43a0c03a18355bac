"""Shampoo: L^-1/4 G R^-1/4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, check_flag, check_number
from ..curvature import GRADIENT, INPUT, Factor, Moment, Power, RunningAverage, Side, Statistic
from ..linalg import Operators, inverse_power
from .base import WHOLE_LAYERS, Factors, check_damping, damping_like
from .inverse import InversePreconditioner
from .registry import register_preconditioner
from .two_sided import damped_powers, exact_relative_damping, two_sided

DAMPING_FORMS = ('relative', 'absolute')
#: Power of each of the two factors.
EXPONENT = 0.25


@register_preconditioner
@dataclass(frozen=True, kw_only=True)
class GradientRoot(InversePreconditioner):
    """Shampoo: ``L^-1/4 U R^-1/4`` of the rule's update U, at the length of U.

    R (i x i) and L (o x o) are running averages, or sums, of G'G and GG'. A step's gradient counts
    in its own step. The rule makes U of plain gradients, so that a momentum is preconditioned as a
    whole.

    Source: Shampoo (Gupta et al., 2018, arXiv 1802.09568, Algorithm 1). The averages and the length
    of another optimizer's update (grafting) come from Anil et al. (2020, arXiv 2002.09018). A
    convolution is the matrix of outputs and patches here; the source treats each dimension of its
    tensor apart, with smaller exponents. Biases take the plain rule.

    State: 2 (o^2 + i^2) numbers per block. A capture costs 2 o i (o + i) FLOPs, a refresh about
    9 n^3 FLOPs per factor, a step 2 o i (o + i) FLOPs.

    Attributes:
        stat_decay: Weight of the old average, in [0, 1); None for sums of all captures.
        damping: Damping of L and R.
        damping_form: 'relative' to a factor's largest eigenvalue, or 'absolute'.
        graft: Whether the result gets the length of U; otherwise it stays as it is.
        solver: 'eigh', or 'lowrank' (default), which keeps the eigenvectors of a side that stand
            out from the damping.
    """

    stat_interval: int = 1
    refresh_interval: int = 10
    early_refreshes: bool = False
    source: str = 'gradient'
    stat_decay: float | None = 0.95
    damping: float = 1e-3
    damping_form: str = 'relative'
    graft: bool = True

    sources: ClassVar[tuple[str, ...]] = ('gradient',)
    dense_solvers: ClassVar[tuple[str, ...]] = ('eigh',)
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic(INPUT, Moment()),
        Statistic(GRADIENT, Moment()),
    )
    rules: ClassVar[tuple[str, ...]] = ('SGDM', 'EMASGD')
    joins_bias: ClassVar[bool] = False
    acts_after_rule: ClassVar[bool] = True

    word: ClassVar[str] = 'Shampoo'
    #: Algorithm 1.
    published: ClassVar[dict[str, Any]] = {
        **WHOLE_LAYERS,
        **dict(
            stat_interval=1,
            refresh_interval=1,
            stat_decay=None,
            damping=1e-6,
            damping_form='absolute',
            graft=False,
            solver='eigh',
            input_factor='patch',
            source='gradient',
        ),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stat_decay is not None:
            check_number('stat_decay', self.stat_decay, high=1)
        check_damping('damping', self.damping)
        check_choice('damping_form', self.damping_form, DAMPING_FORMS)
        check_flag('graft', self.graft)

    def average(self) -> RunningAverage:
        """Moving average from zero, or the sum of all captures."""
        if self.stat_decay is None:
            return RunningAverage(1.0, new_weight=1.0)
        return RunningAverage(self.stat_decay)

    def refresh(
        self, factors: Factors, previous: Operators | None, damping: Tensor | float | None = None
    ) -> tuple[Operators, Tensor]:
        """Inverse fourth roots of the damped factors (see the base class)."""
        damping = self.damping if damping is None else damping

        def amount(side: Side, factor: Factor) -> Tensor:
            if self.damping_form == 'relative':
                return exact_relative_damping(factor, damping)
            value = factor.largest_eigenvalue()
            return torch.as_tensor(damping, dtype=value.dtype, device=value.device).expand_as(value)

        def root(damped: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
            if self.damping_form == 'relative':
                return inverse_power(damped, EXPONENT)
            # An absolute damping may be less than the rounding errors of a large moment.
            return inverse_power(damped, EXPONENT, damping_like(damping, damped).min())

        return damped_powers(factors, amount, Power(root, EXPONENT, self.rank_search), previous)

    def apply(self, operators: Operators, gradients: Tensor) -> Tensor:
        """The gradients themselves."""
        return gradients

    def restore(self, operators: Operators, updates: Tensor) -> Tensor:
        """``L^-1/4 U R^-1/4``; a side without an operator is left alone."""
        roots = two_sided(operators, updates)
        if not self.graft:
            return roots
        sizes, own = (
            torch.linalg.vector_norm(m, dim=(1, 2, 3), keepdim=True) for m in (updates, roots)
        )
        return roots * (sizes / own.clamp_min(torch.finfo(own.dtype).tiny))
