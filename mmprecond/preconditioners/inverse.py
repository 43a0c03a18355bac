"""Preconditioners with a choice of the input factor of patches, and of the solver of inverses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..checks import check_choice, check_number
from ..curvature import INPUT, INPUT_FACTORS, MATRIX, Layer, Moment, Statistic, input_form
from ..linalg import RankSearch
from .base import Preconditioner

#: Sources of statistics.
SOURCES = ('activation', 'gradient')


@dataclass(frozen=True, kw_only=True)
class PatchPreconditioner(Preconditioner):
    """Preconditioner with a choice of the input factor of layers on patches.

    Patches are the inputs of convolutions, and of linear layers behind a flattened feature map
    whose positions are known (see `PreconditionedOptimizer`).

    Attributes:
        input_factor: 'patch' keeps R of whole patches (c p x c p, from c channels and p kernel
            positions). 'separable' keeps its partial traces C (c x c) and K (p x p) and takes
            ``C (x) K / tr`` for R: 1/p^2 of the memory, one product of c x c rows per capture, and
            refreshes of c^3. 'kernel' takes ``I (x) K / c``, with channels left alone: p^2 numbers,
            refreshes of p^3. Both leave out the covariance of a joint bias with the patch. 'auto'
            takes 'separable' for patches longer than 256, and 'patch' for shorter ones.
        source: 'activation' measures R and L of inputs and output gradients, by hooks. 'gradient'
            takes G'G and GG' of the gradient matrix G in their place, in the optimizer's step and
            without hooks (Shampoo). Captures then cost two products with G.
    """

    input_factor: str = 'auto'
    source: str = 'activation'

    #: Sources that the method can take.
    sources: ClassVar[tuple[str, ...]] = SOURCES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice('input_factor', self.input_factor, INPUT_FACTORS)
        check_choice('source', self.source, self.sources)

    def with_gradient_source(self) -> Preconditioner | None:
        """The method with source='gradient', if it can take it."""
        return replace(self, source='gradient') if 'gradient' in self.sources else None

    def candidate_statistics(self, layer: Layer) -> tuple[Statistic, ...]:
        """The method's statistics, of the chosen source."""
        candidates = super().candidate_statistics(layer)
        if self.source == 'activation':
            return candidates
        return tuple(s.over(MATRIX) for s in candidates if layer.has_side(s.side))

    def _with_input_factor(self, layer: Layer, statistic: Statistic) -> Statistic:
        form = input_form(layer, self.input_factor)
        moment = statistic.side == INPUT and isinstance(statistic.form, Moment)
        return statistic.in_form(form) if form and moment else statistic


@dataclass(frozen=True, kw_only=True)
class InversePreconditioner(PatchPreconditioner):
    """Preconditioner with negative powers of damped moments, by a choice of solvers.

    Attributes:
        solver: 'lowrank', or one of the method's own solvers. 'lowrank' keeps the eigenvectors of
            a side that stand out from the damping (see `RankSearch`).
        tolerance: Relative error of an operator that 'lowrank' allows in any direction, less than
            1. At 0.1 and exponent 1 it omits eigenvalues below 0.22 times the damping.
        rank_share: Most columns that 'lowrank' keeps, as a share of a side's length. One value
            stands for all other directions, so that the tolerance may not hold. None keeps as many
            as the tolerance needs, if they are fewer than half.
    """

    solver: str = 'lowrank'
    tolerance: float = 0.1
    rank_share: float | None = 1 / 16

    #: Names of the method's own solvers.
    dense_solvers: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice('solver', self.solver, (*self.dense_solvers, 'lowrank'))
        check_number('tolerance', self.tolerance, open_low=True, high=1)
        if self.rank_share is not None:
            check_number('rank_share', self.rank_share, open_low=True, high=1)

    @property
    def rank_search(self) -> RankSearch | None:
        """Search for the rank with solver='lowrank', else None."""
        if self.solver != 'lowrank':
            return None
        return RankSearch(self.tolerance, self.max_rank, self.rank_share)

    def is_exact(self, refreshes: int) -> bool:
        """False for refreshes of 'lowrank' after the first, which start from the last one."""
        return self.solver != 'lowrank' or refreshes == 0
