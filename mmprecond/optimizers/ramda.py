"""RAMDA: training that sets whole filters to zero."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import nn

from ..checks import argument_names, reject_unexpected
from ..rules.ramda import RAMDARule
from .rule_optimizer import RuleOptimizer
from .settings import takes_settings


class Sparsity(NamedTuple):
    """Numbers of filters that are regularized, and of those that are zero."""

    zero: int
    filters: int

    @property
    def share(self) -> float:
        """Share of the filters that are zero."""
        return self.zero / self.filters if self.filters else 0.0


class RAMDA(RuleOptimizer):
    """Regularized adaptive momentum dual averaging, which prunes filters in training.

    See `RAMDARule` for the step. It takes three numbers for each weight. Filters become exactly
    zero at the end of a run, when the momentum rises to 1: give it a schedule
    (MMEngine's `LinearMomentum`), or set it in the last steps. `sparsity` counts them. A filter
    before batch normalisation can be zero without harm to the rest; give layers whose filters must
    stay, such as the last one, a group with ``sparsity=0``.

    Source: RAMDA (arXiv 2403.14398) and its code.

    Args:
        params: Parameters or groups, or the module itself.
        lr: Learning rate.
        momentum: Weight of the dual average in each step, in (0, 1]; 1 is no momentum.
        weight_decay: Added to the gradient, times the weights.
        sparsity: Weight of the group lasso. The source takes 1e-4 to 1e-2 by the task.
        eps: Added to the metric.
        linear: Whether rows of matrices are filters too; default: filters of convolutions alone.
        restart: Fall of lr at which the average starts again, from the present weights.
        settings: 'default', or 'published' for the literal settings of the source.
        **unexpected: Other arguments, which are refused.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If a setting is unknown.
    """

    rule: RAMDARule

    published: ClassVar[dict[str, Any]] = dict(momentum=0.1, eps=1e-6, linear=False, restart=0.1)

    @takes_settings
    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        momentum: float = 0.1,
        weight_decay: float = 0.0,
        *,
        sparsity: float = 1e-4,
        eps: float = 1e-6,
        linear: bool = False,
        restart: float = 0.1,
        **unexpected: Any,
    ) -> None:
        reject_unexpected('RAMDA', unexpected, argument_names(RAMDA))
        if isinstance(params, nn.Module):
            params = params.parameters()
        defaults = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, sparsity=sparsity, eps=eps
        )
        super().__init__(params, RAMDARule(linear, restart), defaults)

    def sparsity(self) -> Sparsity:
        """Filters of all regularized weights, and those that are zero now."""
        zero = total = 0
        for group in self.param_groups:
            for p in group['params']:
                if self.rule.has_filters(p, group):
                    total += len(p)
                    zero += int((p.detach().flatten(1) == 0).all(1).sum())
        return Sparsity(zero, total)

    def report(self) -> str:
        """Sentence about the parameters, and how many filters are zero now."""
        found = self.sparsity()
        return (
            f'{super().report()}; {found.zero:,} of {found.filters:,} filters are zero '
            f'({100 * found.share:.1f} %)'
        )
