"""An optimizer that benchmark.py times: its copy of the model, its steps and their kinds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from common.timing import now
from mmprecond.optimizers import PreconditionedOptimizer

#: Steps between captures and between refreshes while the clock runs.
CAPTURE, REFRESH = 2, 4
KINDS = ('plain', 'statistics', 'refresh')


@dataclass
class Entry:
    """One optimizer with its copy of the model.

    Attributes:
        name: As the user wrote it.
        model: Its copy.
        optimizer: The optimizer.
        seconds: Times of whole iterations by the kind of step.
        steps: Times of `optimizer.step()` alone.
        peak_mb: Peak memory.
    """

    name: str
    model: Any
    optimizer: Any
    seconds: dict[str, list[float]] = field(default_factory=lambda: {k: [] for k in KINDS})
    steps: dict[str, list[float]] = field(default_factory=lambda: {k: [] for k in KINDS})
    peak_mb: float = 0.0

    @property
    def base(self) -> str:
        """The first-order optimizer that it is compared with."""
        return 'AdamW' if 'betas' in self.optimizer.defaults else 'SGD'

    def kind(self, step: int) -> str:
        """Work of a step beside training."""
        if not isinstance(self.optimizer, PreconditionedOptimizer):
            return 'plain'
        method = self.optimizer.curvature.stacks[0].method
        if method.stat_interval != CAPTURE:  # it measures at every step by its nature
            return 'plain'
        count = step + method.phase
        return 'plain' if count % CAPTURE else 'statistics' if count % REFRESH else 'refresh'

    def train(self, batch: dict[str, Any]) -> tuple[float, float]:
        """One iteration: seconds of all of it, and of the optimizer's step."""
        start = now(batch['inputs'])
        loss = self.model.parse_losses(self.model(**batch, mode='loss'))[0]
        self.optimizer.zero_grad()
        loss.backward()
        if getattr(self.optimizer, 'needs', '') == 'loss':
            self.optimizer.loss = loss.detach()
        middle = now(batch['inputs'])
        self.optimizer.step()
        end = now(batch['inputs'])
        return end - start, end - middle

    def state_mb(self) -> float:
        """Moments, statistics and operators."""
        tensors = [t for state in self.optimizer.state.values() for t in flat(state)]
        curvature = getattr(self.optimizer, 'curvature', None)
        for stack in curvature.stacks if curvature else []:
            tensors += [*stack.statistics.values(), *stack.operator_tensors.values()]
        return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def flat(state: Any) -> list[torch.Tensor]:
    """The tensors in a nested state."""
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state
    return [t for v in values for t in flat(v)] if isinstance(state, (dict, list, tuple)) else []
