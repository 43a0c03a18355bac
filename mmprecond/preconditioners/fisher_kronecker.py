"""KFAC and SKFAC: L^-1 G R^-1 with the Kronecker factors of the Fisher matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_number
from ..curvature import BLOCKS, COLUMNS, MOMENT, REDUCED, SAMPLED, Layer, RunningAverage
from ..linalg import cholesky_inverse
from .base import Preconditioner, check_damping
from .sides import (
    Stacked,
    damped_sides,
    recover_norm,
    relative_damping,
    side_name,
    trace,
    two_sided,
)

REDUCTIONS = {'expand': '', 'reduce': REDUCED, 'sample': SAMPLED}
SOLVERS = ('inverse', 'woodbury')
DAMPING_FORMS = ('pi', 'relative')
SCALINGS = ('kl_clip', 'norm_recovery', 'none')

#: Bound of pi: a factor of zero must not take all the damping.
LARGEST_PI = 1e10


@dataclass(frozen=True, kw_only=True)
class FisherKronecker(Preconditioner):
    """KFAC and SKFAC, the thesis's baselines, with a switch for each thing in which they differ.

    R = sum x'x / n and L = n sum g'g over n rows x of the input and g of the gradient of the mean
    loss: the factors of a Fisher matrix whose n samples each are one row.

    Source: KFAC (arXiv 1503.05671); thesis (3.4); 'reduce' from arXiv 2311.00636; defaults of
    damping and `kl_clip` from the public baselines that the thesis and MAC compare with. KFAC* of
    the thesis is damping_form='relative', damping=0.01, scaling='norm_recovery'. SKFAC (Tang et
    al., CVPR 2021) is solver='woodbury', reduction='sample', stat_decay=0: of the batch at the
    refresh it keeps few rows, and inverts a matrix of their number.

    State: 2 (o^2 + i^2) numbers a block. A refresh costs n^3 FLOPs a factor, a step 2 o i (o + i).
    With m columns on a side of n > m: 2 n m numbers; 2 n m^2 FLOPs and 4 o i m.

    Attributes:
        stat_decay: Weight of the old statistic, in [0, 1); the first sample starts from itself.
        damping: rho.
        damping_form: 'pi': R + pi sqrt(rho) I and L + sqrt(rho) / pi I, with pi^2 the ratio of the
            factors' mean eigenvalues; 'relative': each + rho lambda_max I.
        reduction: 'expand': every position (of a feature map or sequence) is a row; 'reduce': a
            sample is one row, of its positions' mean input and summed gradient; 'sample': some
            positions of each sample, drawn at random, stand for all.
        positions: Number of positions that 'sample' draws of a sample at each call; `max_rows` is
            for 'expand'.
        solver: 'inverse': exact inverses of factors; 'woodbury': on sides longer than
            `max_columns` the rows themselves are kept, and the inverse follows by the
            Sherman-Morrison-Woodbury identity. It is the same inverse while the rows of all calls
            and micro-batches on a rank are no more than its share of `max_columns`; further rows
            are added on top with random signs, which is right in the mean alone. (Of 64 images
            with 8 positions each half are; where windows or RoIs are samples, far more.) It needs
            stat_decay=0, and reduction 'sample' or 'reduce'.
        max_columns: Rows kept of one side.
        scaling: 'kl_clip' scales all layers by min(1, sqrt(kl_clip / sum lr^2 <V, G>));
            'norm_recovery' each layer to its gradient's norm; or 'none'.
        kl_clip: The bound of 'kl_clip'.
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

    requires: ClassVar[tuple[str, ...]] = ('input_moment', 'gradient_moment')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number('stat_decay', self.stat_decay, high=1)
        check_damping('damping', self.damping)
        check_damping('kl_clip', self.kl_clip)
        check_choice('damping_form', self.damping_form, DAMPING_FORMS)
        check_choice('reduction', self.reduction, tuple(REDUCTIONS))
        check_choice('solver', self.solver, SOLVERS)
        check_count('positions', self.positions)
        check_count('max_columns', self.max_columns)
        check_choice('scaling', self.scaling, SCALINGS)
        if self.solver == 'woodbury' and (self.stat_decay or self.reduction == 'expand'):
            raise ValueError(f"solver='woodbury' keeps few rows of one batch: set stat_decay=0 and "
                             f"reduction='sample' or 'reduce', not stat_decay={self.stat_decay} "
                             f'and reduction={self.reduction!r}')

    @property
    def capture_interval(self) -> int:
        """A sample that the next one replaces is not captured."""
        return self.stat_interval if self.stat_decay else self.refresh_interval

    @property
    def layer_options(self) -> dict[str, int | str | None]:
        """How many rows are drawn and kept."""
        rows = None if self.reduction == 'sample' else self.max_rows
        return {**super().layer_options, 'positions': self.positions, 'slots': self.max_columns,
                'max_rows': rows}

    def wanted(self, layer: Layer) -> tuple[str, ...]:
        """The factors, or their columns, over the rows that the reduction takes."""
        return tuple(self._wanted_one(name, layer) for name in self.requires)

    def _wanted_one(self, name: str, layer: Layer) -> str:
        tall = layer.statistic_shape(name)[-1] > self.max_columns
        if self.solver == 'woodbury' and tall:
            name = name.replace(MOMENT, COLUMNS)
        return name + REDUCTIONS[self.reduction]

    def note(self, layer: Layer) -> str:
        """Says where the rows are kept."""
        columns = any(COLUMNS in name for name in self.required(layer))
        return super().note(layer) or ('Woodbury' if columns else '')

    def gradient_factor(self, rows: float) -> float:
        """Makes each row the gradient of its own loss."""
        return rows

    @property
    def is_inverse(self) -> bool:
        """They are."""
        return True

    def average(self) -> RunningAverage:
        """Moving average that starts from the first sample."""
        return RunningAverage(self.stat_decay, from_first=True)

    def refresh(self, statistics: Stacked, previous: Stacked | None,
                damping: Tensor | float | None = None) -> tuple[Stacked, Tensor]:
        """Inverts the damped factors (see the base class)."""
        damping = self.damping if damping is None else damping
        amounts = self._dampings(statistics, damping)
        return damped_sides(statistics, lambda name, _: amounts[name],
                            lambda _, damped: cholesky_inverse(damped))

    def _dampings(self, statistics: Stacked, damping: Tensor | float) -> Stacked:
        """What is added to each factor's diagonal (k, b), by the side's name."""
        factors = {side_name(statistic): s for statistic, s in statistics.items()}
        if self.damping_form == 'relative':
            return {name: relative_damping(s, damping, name) for name, s in factors.items()}
        means = {name: trace(name, s) / s.shape[-2] for name, s in factors.items()}
        if any(BLOCKS in name for name in means):  # of whole sides
            means = {name: mean.mean(-1, keepdim=True) for name, mean in means.items()}
        root = damping**0.5
        if len(means) < 2:
            return {name: root + torch.zeros_like(mean) for name, mean in means.items()}
        first, second = sorted(means, reverse=True)  # the input's, the gradient's
        pi = (means[first] / means[second]).sqrt()
        pi = pi.nan_to_num(nan=1.).clamp(1 / LARGEST_PI, LARGEST_PI)
        amounts = {first: root * pi, second: root / pi}
        return {name: amounts[name].expand(factors[name].shape[:2]) for name in factors}

    def apply(self, operator: Stacked, gradients: Tensor) -> Tensor:
        """``L^-1 G R^-1``; the KL clip comes after, over all layers."""
        directions = two_sided(operator, gradients)
        if self.scaling == 'norm_recovery':
            return recover_norm(directions, gradients)
        return directions

    @property
    def clip(self) -> float | None:
        """The bound of the KL clip, or None."""
        return self.kl_clip if self.scaling == 'kl_clip' else None
