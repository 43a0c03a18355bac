"""KFAC and SKFAC: L^-1 G R^-1 with the Kronecker factors of the Fisher matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_number
from ..curvature import (
    ALL,
    GRADIENT,
    INPUT,
    REDUCED,
    Blocks,
    Columns,
    Layer,
    Moment,
    Power,
    Rows,
    RunningAverage,
    SampledRows,
    Side,
    Statistic,
)
from ..linalg import Operators, cholesky_inverse
from .base import WHOLE_LAYERS, Factors, check_damping
from .inverse import PatchPreconditioner
from .registry import register_preconditioner
from .two_sided import damped_powers, relative_damping, two_sided

REDUCTIONS = ('expand', 'reduce', 'sample')
SOLVERS = ('inverse', 'woodbury')
DAMPING_FORMS = ('pi', 'relative', 'gradient')
SCALINGS = ('kl_clip', 'norm_recovery', 'none')

#: Bound of pi, so that a zero factor does not take all the damping.
LARGEST_PI = 1e10


@register_preconditioner
@dataclass(frozen=True, kw_only=True)
class FisherKronecker(PatchPreconditioner):
    """KFAC and SKFAC, the baselines of the thesis, with a setting for each of their differences.

    R = sum x'x / n and L = n sum g'g, over n rows x of the input and n rows g of the gradient of
    the mean loss. They are the factors of a Fisher matrix with one sample per row.

    Source: KFAC (arXiv 1503.05671); thesis (3.4); 'reduce' from arXiv 2311.00636. The defaults of
    damping and `kl_clip` come from the public baselines that the thesis and MAC compare with. KFAC*
    of the thesis is taken as damping_form='relative', damping=0.01, scaling='norm_recovery'. SKFAC
    (Tang et al., CVPR 2021) is solver='woodbury', reduction='sample', stat_decay=0. It keeps few
    rows of the batch at the refresh, and inverts a matrix of that size.

    State: 2 (o^2 + i^2) numbers per block. A refresh costs n^3 FLOPs per factor, a step costs
    2 o i (o + i) FLOPs. A side of length n with m < n columns takes 2 n m numbers, 2 n m^2 FLOPs
    per refresh and 4 o i m FLOPs per step.

    Attributes:
        stat_decay: Weight of the old statistic, in [0, 1); the average starts at the first sample.
        damping: rho.
        damping_form: 'pi' inverts R + pi sqrt(rho) I and L + sqrt(rho) / pi I, where pi^2 is the
            ratio of the factors' mean eigenvalues. 'relative' adds rho lambda_max I to each factor.
            'gradient' is 'pi' with a rho that starts at `damping`, and is proportional to the
            gradient's norm and adapted from the loss (see `core.gradient_damping.GradientDamping`).
            The optimizer then needs the loss of each step.
        reduction: 'expand': each position (of a feature map or sequence) is one row. 'reduce': each
            sample is one row, with the mean input and the summed gradient of its positions.
            'sample': random positions of each sample represent all of them.
        positions: Number of positions of each sample that 'sample' draws at each call. (The setting
            `max_rows` is for 'expand'.)
        solver: 'inverse' computes exact inverses of the factors. 'woodbury' keeps the rows
            themselves on sides longer than `max_columns`, and applies the
            Sherman-Morrison-Woodbury identity. The inverse is the same while a rank has no more
            rows of all calls and micro-batches than its share of `max_columns`. Further rows are
            added to others with random signs, which is unbiased but not exact. (This holds for half
            the rows of 64 images with 8 positions each, and for far more if windows or RoIs are
            samples.) 'woodbury' needs stat_decay=0, and reduction 'sample' or 'reduce'.
        max_columns: Number of rows kept for one side.
        scaling: 'kl_clip' scales all layers by min(1, sqrt(kl_clip / sum lr^2 <V, G>)).
            'norm_recovery' scales each layer to the norm of its gradient. 'none' does not scale.
        kl_clip: Bound of the KL clip.
    """

    stat_decay: float = 0.95
    damping: float = 0.03
    damping_form: str = 'pi'
    reduction: str = 'expand'
    positions: int = 8
    solver: str = 'inverse'
    max_columns: int = 256
    scaling: str = 'kl_clip'
    kl_clip: float = 1e-3

    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic(INPUT, Moment()),
        Statistic(GRADIENT, Moment()),
    )

    sources: ClassVar[tuple[str, ...]] = ('activation',)
    word: ClassVar[str] = 'KFAC'
    variants: ClassVar[dict[str, dict[str, Any]]] = dict(
        SKFAC=dict(solver='woodbury', reduction='sample', stat_decay=0.0)
    )
    #: The baseline of the thesis's tables.
    published: ClassVar[dict[str, Any]] = dict(
        stat_interval=20,
        refresh_interval=200,
        stat_decay=0.95,
        damping=0.03,
        damping_form='pi',
        reduction='expand',
        positions=8,
        solver='inverse',
        max_columns=256,
        scaling='kl_clip',
        kl_clip=1e-3,
        input_factor='patch',
        source='activation',
        **WHOLE_LAYERS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number('stat_decay', self.stat_decay, high=1)
        check_damping('damping', self.damping)
        check_damping('kl_clip', self.kl_clip)
        check_choice('damping_form', self.damping_form, DAMPING_FORMS)
        check_choice('reduction', self.reduction, REDUCTIONS)
        check_choice('solver', self.solver, SOLVERS)
        check_count('positions', self.positions)
        check_count('max_columns', self.max_columns)
        check_choice('scaling', self.scaling, SCALINGS)
        if self.solver == 'woodbury' and (self.stat_decay or self.reduction == 'expand'):
            raise ValueError(
                f"solver='woodbury' keeps few rows of one batch: set stat_decay=0 and "
                f"reduction='sample' or 'reduce', not stat_decay={self.stat_decay} "
                f'and reduction={self.reduction!r}'
            )

    @property
    def capture_interval(self) -> int:
        """Steps between captures; samples that a later one replaces are not captured."""
        return self.stat_interval if self.stat_decay else self.refresh_interval

    def candidate_statistics(self, layer: Layer) -> tuple[Statistic, ...]:
        """Factors, or their columns, over the rows of the reduction."""
        return tuple(self._statistic_of(statistic.side, layer) for statistic in self.statistics)

    def _statistic_of(self, side: Side, layer: Layer) -> Statistic:
        rows: Rows = {'expand': ALL, 'reduce': REDUCED, 'sample': SampledRows(self.positions)}[
            self.reduction
        ]
        tall = layer.size_of(side)[1] > self.max_columns
        if self.solver == 'woodbury' and tall:
            return Statistic(side, Columns(self.max_columns), rows)
        return Statistic(side, Moment(), rows)

    def note(self, layer: Layer) -> str:
        """Marks layers that keep rows (see the base class)."""
        has_columns = any(isinstance(s.form, Columns) for s in self.selected_statistics(layer))
        return super().note(layer) or ('Woodbury' if has_columns else '')

    def gradient_factor(self, rows: float) -> float:
        """Factor that makes each row the gradient of its own loss."""
        return rows

    @property
    def is_inverse(self) -> bool:
        """Dense operators are inverses of damped moments."""
        return True

    def average(self) -> RunningAverage:
        """Moving average that starts from the first sample."""
        return RunningAverage(self.stat_decay, from_first=True)

    def refresh(
        self, factors: Factors, previous: Operators | None, damping: Tensor | float | None = None
    ) -> tuple[Operators, Tensor]:
        """Inverts the damped factors (see the base class)."""
        damping = self.damping if damping is None else damping
        amounts = self._dampings(factors, damping)
        return damped_powers(
            factors,
            lambda side, _: amounts[side],
            Power(lambda damped, last: cholesky_inverse(damped)),
        )

    def _dampings(self, factors: Factors, damping: Tensor | float) -> dict[Side, Tensor]:
        """Amounts added to each factor's diagonal (k, b)."""
        if self.damping_form == 'relative':
            return {side: relative_damping(factor, damping) for side, factor in factors.items()}
        means = {side: factor.trace() / factor.length for side, factor in factors.items()}
        if any(isinstance(factor.form, Blocks) for factor in factors.values()):  # of whole sides
            means = {side: mean.mean(-1, keepdim=True) for side, mean in means.items()}
        root = damping**0.5
        if len(means) < 2:
            return {side: root + torch.zeros_like(mean) for side, mean in means.items()}
        pi = (means[INPUT] / means[GRADIENT]).sqrt()
        pi = pi.nan_to_num(nan=1.0).clamp(1 / LARGEST_PI, LARGEST_PI)
        amounts = {INPUT: root * pi, GRADIENT: root / pi}
        return {
            side: amounts[side].expand(factor.tensors[0].shape[:2])
            for side, factor in factors.items()
        }

    def apply(self, operators: Operators, gradients: Tensor) -> Tensor:
        """``L^-1 G R^-1``; the KL clip follows later, over all layers."""
        return two_sided(operators, gradients)

    def norm_parts(self, layer: Layer) -> int:
        """One norm for the layer with scaling='norm_recovery'."""
        return int(self.scaling == 'norm_recovery')

    @property
    def clip(self) -> float | None:
        """The bound of the KL clip, or None."""
        return self.kl_clip if self.scaling == 'kl_clip' else None
