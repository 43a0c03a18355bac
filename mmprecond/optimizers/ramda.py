"""RAMDA: training that sets whole filters to zero."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from ..checks import argument_names, reject_unexpected
from ..rules.ramda import RAMDARule
from .length_input import LengthInput
from .rule_optimizer import RuleOptimizer, split_module
from .settings import takes_settings


class Sparsity(NamedTuple):
    """Numbers of filters that are regularized, and of those that are zero."""

    zero: int
    filters: int

    @property
    def share(self) -> float:
        """Share of the filters that are zero."""
        return self.zero / self.filters if self.filters else 0.0


class RAMDA(LengthInput, RuleOptimizer):
    """Regularized adaptive momentum dual averaging, which prunes filters in training.

    See `RAMDARule` for the step. It takes three numbers for each weight. Filters become exactly
    zero at the end of a run, when the momentum rises to 1. For this the optimizer must know the
    length of the run: MMEngine's wrapper tells it; elsewhere give `total_steps`. `sparsity` counts
    the filters. They stay in the weights as zeros: removing them is left to other tools. Give
    layers whose filters must stay a group with ``group_lasso=0``.

    Source: RAMDA (arXiv 2403.14398) and its code.

    Args:
        params: Parameters or groups, or the module itself.
        lr: Learning rate.
        momentum: Weight of the dual average in each step before it rises, in (0, 1]; 1 is no
            momentum.
        weight_decay: Added to the gradient, times the weights.
        group_lasso: Weight of the group lasso, times the sum of ``lr sqrt(t)``: its effect grows
            with the rate and the length of the run. The source takes 1e-4 to 1e-2.
        total_steps: Number of optimizer steps of the run.
        eps: Added to the diagonal D.
        prune_matrices: Whether rows of matrices are filters too; default: those of convolutions
            alone.
        restart: The average starts again, from the present weights, when lr falls to this share of
            its largest value.
        rise: Share of the run, at its end, in which the momentum rises.
        settings: 'default', or 'published' for the literal settings of the source.
        **unexpected: Other arguments, which are refused.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If a setting is unknown.
    """

    rule: RAMDARule
    needs = 'length'

    published: ClassVar[dict[str, Any]] = dict(
        momentum=0.1, eps=1e-6, prune_matrices=False, restart=0.1
    )

    @takes_settings
    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        momentum: float = 0.1,
        weight_decay: float = 0.0,
        *,
        group_lasso: float = 1e-4,
        total_steps: int | None = None,
        eps: float = 1e-6,
        prune_matrices: bool = False,
        restart: float = 0.1,
        rise: float = 1 / 3,
        **unexpected: Any,
    ) -> None:
        reject_unexpected('RAMDA', unexpected, argument_names(RAMDA))
        _, params = split_module(params, None)
        defaults = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, group_lasso=group_lasso, eps=eps
        )
        super().__init__(params, RAMDARule(prune_matrices, restart, rise), defaults)
        self._request_steps(total_steps)
        self.rule.plan_steps(self.total_steps)

    def plan_steps(self, count: int) -> None:
        """Sets the number of optimizer steps of the run; the user's `total_steps` has priority."""
        super().plan_steps(count)
        self.rule.plan_steps(self.total_steps)

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
        counts = self.sparsity()
        return (
            f'{super().report()}; {counts.zero:,} of {counts.filters:,} filters are zero '
            f'({100 * counts.share:.1f} %)'
        )
