"""SAM-GS: gradients of different norms get one norm; others are weighted by their momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_number
from .base import Aggregator


class SAMGS(Aggregator):
    """Similarity-aware momentum gradient surgery.

    The magnitude similarity of two gradients is ``2 |g_i| |g_j| / (|g_i|^2 + |g_j|^2)``; s is the
    mean over all pairs. If s is below a threshold, all gradients get the mean norm, and the result
    is their sum. Otherwise it is the sum of ``g_i |m_i| / sqrt(v)`` (elementwise), with
    bias-corrected moving averages m_i of g_i and v of ``(1 - s)^2``. The two cases have different
    scales: use a rule like Adam, whose updates have none.

    Source: Gradient Similarity Surgery in Multi-Task Deep Learning (arXiv 2506.06130) and its code
    for Cityscapes.

    Args:
        threshold: Threshold of s, default 0.7; the source takes 0.1 to 0.9.
        momentum: Decay of m, in [0, 1); default 0.9.
        decay: Decay of v, in [0, 1); default 0.99.
        eps: Added to v in each step; default 1e-8.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self, threshold: float = 0.7, momentum: float = 0.9, decay: float = 0.99, eps: float = 1e-8
    ) -> None:
        check_number('threshold', threshold)
        check_number('momentum', momentum, high=1)
        check_number('decay', decay, high=1)
        check_number('eps', eps, open_low=True)
        self.threshold, self.momentum, self.decay, self.eps = threshold, momentum, decay, eps
        self._average: Tensor | None = None
        self._spread = 0.0
        self._steps = 0

    def combine(self, gradients: Tensor) -> Tensor:
        norms = gradients.norm(dim=1).double()
        similarity = self._similarity(norms)
        self._steps += 1
        if self._average is None:
            self._average = torch.zeros_like(gradients)
        self._average.lerp_(gradients, 1 - self.momentum)
        self._spread = self.decay * self._spread + (1 - self.decay) * (1 - similarity) ** 2
        self._spread += self.eps
        if similarity < self.threshold:
            scale = torch.where(norms > 0, norms.mean() / norms.clamp(min=1e-300), 0.0)
            return scale.to(gradients) @ gradients
        average = self._average.abs() / (1 - self.momentum**self._steps)
        spread = self._spread / (1 - self.decay**self._steps)
        return (gradients * average).sum(0) / spread**0.5

    @staticmethod
    def _similarity(norms: Tensor) -> float:
        """Mean similarity of all pairs of norms (k,); pairs of zeros are alike."""
        first, second = torch.combinations(norms, 2).T
        squares = first**2 + second**2
        alike = torch.where(squares > 0, 2 * first * second / squares.clamp(min=1e-300), 1.0)
        return float(alike.mean()) if len(alike) else 1.0

    def state_dict(self) -> dict[str, Any]:
        return {'average': self._average, 'spread': self._spread, 'steps': self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        average = state['average']
        self._average = None if average is None else average.clone()
        self._spread, self._steps = state['spread'], state['steps']
