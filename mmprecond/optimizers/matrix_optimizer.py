"""Base class of optimizers with special updates for matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import argument_names, reject_unexpected
from ..curvature import unwrap
from ..rules.base import Group
from ..rules.matrix import MatrixRule, matrix_shape
from .rule_optimizer import RuleOptimizer, split_module


class MatrixOptimizer(RuleOptimizer):
    """Torch optimizer that applies a `MatrixRule`.

    Args:
        params: Parameters or groups, or the module itself.
        rule: The rule.
        defaults: The rule's hyper-parameters.
        model: The module, for the parameters' names in `table`.
        unexpected: Keyword arguments that the optimizer does not have.

    Raises:
        ValueError: If a value is out of range, or the model is sharded.
        TypeError: If a setting is unknown.
    """

    rule: MatrixRule
    group_keys = ('precondition',)

    def __init__(
        self,
        params: Any,
        rule: MatrixRule,
        defaults: Group,
        model: nn.Module | None,
        unexpected: dict[str, Any],
    ) -> None:
        reject_unexpected(type(self).__name__, unexpected, argument_names(type(self)))
        model, params = split_module(params, model)
        named = [] if model is None else unwrap(model).named_parameters()
        self.names: dict[Tensor, str] = {p: name for name, p in named}
        super().__init__(params, rule, defaults)

    def table(self) -> str:
        """Numbers of matrices and of other parameters, with the memory of the matrices' state.

        The memory includes everything that is kept for them between steps.
        """
        matrices, numbers, vectors, state_bytes = 0, 0, 0, 0
        for group in self.param_groups:
            for p in group['params']:
                reason = self.rule.fallback_reason(p, group)
                if reason is None:
                    shapes = self.rule.state_shapes(matrix_shape(p), group).values()
                    matrices, numbers = matrices + 1, numbers + p.numel()
                    state_bytes += sum(torch.Size(shape).numel() for shape in shapes) * max(
                        p.element_size(), 4
                    )
                vectors += reason == ''
        return '\n'.join(
            [
                f'{matrices} matrices ({numbers} numbers) take {type(self).__name__}, with '
                f'{state_bytes / 2**20:.1f} MB of state; {vectors} vectors and scalars take AdamW',
                *self.rule.notes(self.param_groups, self.names),
            ]
        )
