"""KFAC: L^-1 G R^-1 with exact inverses of the Fisher matrix's Kronecker factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, check_number
from ..curvature import REDUCED, Layer, RunningAverage
from ..linalg import cholesky_inverse
from .base import (
    Preconditioner,
    Stacked,
    add_damping,
    check_damping,
    recover_norm,
    relative_damping,
    two_sided,
)

REDUCTIONS = ('expand', 'reduce')
DAMPING_FORMS = ('pi', 'relative')
SCALINGS = ('kl_clip', 'norm_recovery', 'none')

#: Bound of pi: a factor of zero must not take all the damping.
LARGEST_PI = 1e10


@dataclass(frozen=True, kw_only=True)
class FisherKronecker(Preconditioner):
    """KFAC, the thesis's baseline, with a switch for each thing in which its variants differ.

    R = sum x'x / n and L = n sum g'g over n rows x of the input and g of the gradient of the mean
    loss: the factors of a Fisher matrix whose n samples each are one row.

    Source: KFAC (arXiv 1503.05671); thesis (3.4); 'reduce' from arXiv 2311.00636; defaults of
    damping and `kl_clip` from the public baselines that the thesis and MAC compare with. KFAC* of
    the thesis is damping_form='relative', damping=0.01, scaling='norm_recovery'.

    State: 2 (o^2 + i^2) numbers a block. A refresh costs n^3 FLOPs a factor, a step 2 o i (o + i).

    Attributes:
        stat_decay: Weight of the old statistic, in [0, 1); the first sample starts from itself.
        damping: rho.
        damping_form: 'pi': R + pi sqrt(rho) I and L + sqrt(rho) / pi I, with pi^2 the ratio of the
            factors' mean eigenvalues; 'relative': each + rho lambda_max I.
        reduction: 'expand': every position (of a feature map or sequence) is a row; 'reduce': a
            sample is one row, of its positions' mean input and summed gradient.
        scaling: 'kl_clip' scales all layers by min(1, sqrt(kl_clip / sum lr^2 <V, G>));
            'norm_recovery' each layer to its gradient's norm; or 'none'.
        kl_clip: The bound of 'kl_clip'.
    """

    stat_decay: float = 0.95
    damping: float = 0.03
    damping_form: str = 'pi'
    reduction: str = 'expand'
    scaling: str = 'kl_clip'
    kl_clip: float = 1e-3

    requires: ClassVar[tuple[str, ...]] = ('input_moment', 'gradient_moment')
    per_row: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number('stat_decay', self.stat_decay, high=1)
        check_damping('damping', self.damping)
        check_damping('kl_clip', self.kl_clip)
        check_choice('damping_form', self.damping_form, DAMPING_FORMS)
        check_choice('reduction', self.reduction, REDUCTIONS)
        check_choice('scaling', self.scaling, SCALINGS)

    def wanted(self, layer: Layer) -> tuple[str, ...]:
        """The factors over rows or over samples."""
        suffix = REDUCED if self.reduction == 'reduce' else ''
        return tuple(name + suffix for name in self.requires)

    def operator_shapes(self, layer: Layer) -> dict[str, tuple[int, int, int]]:
        """One for each factor, by its name without the reduction."""
        return {name.removesuffix(REDUCED): layer.statistic_shape(name)
                for name in self.required(layer)}

    def average(self) -> RunningAverage:
        """Moving average that starts from the first sample."""
        return RunningAverage(self.stat_decay, from_first=True)

    def refresh(self, statistics: Stacked, previous: Stacked | None,
                damping: Tensor | float | None = None) -> tuple[Stacked, Tensor]:
        """Inverts the damped factors (see the base class)."""
        damping = self.damping if damping is None else damping
        factors = {name.removesuffix(REDUCED): s for name, s in statistics.items()}
        amounts = self._dampings(factors, damping)
        results = {name: cholesky_inverse(add_damping(factor, amounts[name]))
                   for name, factor in factors.items()}
        good = torch.stack([fine.all(-1) for _, fine in results.values()]).all(0)
        return {name: inverse for name, (inverse, _) in results.items()}, good

    def _dampings(self, factors: Stacked, damping: Tensor | float) -> Stacked:
        """What is added to each factor's diagonal (k, b)."""
        if self.damping_form == 'relative':
            return {name: relative_damping(s, damping) for name, s in factors.items()}
        means = {name: s.diagonal(dim1=-2, dim2=-1).mean(-1) for name, s in factors.items()}
        root = damping**0.5
        if len(means) < 2:
            return {name: root + torch.zeros_like(mean) for name, mean in means.items()}
        pi = (means['input_moment'] / means['gradient_moment']).sqrt()
        pi = pi.nan_to_num(nan=1.).clamp(1 / LARGEST_PI, LARGEST_PI)
        return {'input_moment': root * pi, 'gradient_moment': root / pi}

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
