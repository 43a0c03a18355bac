"""GCond: pairs in conflict are resolved by its size, and an arbiter chooses who yields."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_count, check_number
from .base import Aggregator, cosines, gram


class GCond(Aggregator):
    """Gradient conductor, made for gradients that are accumulated over several batches.

    The pair with the smallest cosine is resolved first, and so on until none is below the weak
    threshold or 2 k pairs were resolved. By the cosine:

    - main <= cosine < weak: both lose their component along the other;
    - critical <= cosine < main: the one that yields loses its component along the other;
    - cosine < critical: the one that yields is left out.

    The arbiter scores both by ``weights[0] max(stability, 0) + weights[1] strength``. Stability is
    the cosine with the loss's own gradient of the step before. Strength is a gradient's norm,
    divided by that norm's moving average (which starts at 1), as a share of the pair's total. The
    gradient with the lower score yields. One that won the last `window` times yields too. The
    result is the sum.

    Source: GCond (arXiv 2509.07252) and its code, its four zones. Its momentum and trust ratio
    are left to the optimizer.

    Args:
        thresholds: Cosines (critical, main, weak), ascending; default (-0.8, -0.5, 0).
        weights: Weights of stability and strength; default (0.8, 0.2).
        window: Wins in a row after which a loss yields, default 3; 0 for no such rule.
        decay: Decay of the norms' moving averages, in [0, 1); default 0.95.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        thresholds: Sequence[float] = (-0.8, -0.5, 0.0),
        weights: Sequence[float] = (0.8, 0.2),
        window: int = 3,
        decay: float = 0.95,
    ) -> None:
        ascending = len(thresholds) == 3 and -1 <= thresholds[0] <= thresholds[1] <= thresholds[2]
        if not (ascending and thresholds[2] <= 1):
            raise ValueError(
                f'thresholds={tuple(thresholds)} are not three ascending cosines; write '
                'thresholds=(-0.8, -0.5, 0.0)'
            )
        if len(weights) != 2:
            raise ValueError(
                f'weights={tuple(weights)} are not two numbers; write weights=(0.8, 0.2)'
            )
        for weight in weights:
            check_number('weights', weight)
        check_count('window', window, low=0)
        check_number('decay', decay, high=1)
        self.thresholds = tuple(thresholds)
        self.stability, self.strength = weights
        self.decay = decay
        self._winners: deque[int] = deque(maxlen=window)
        self._norms: Tensor | None = None
        self._before: Tensor | None = None

    def combine(self, gradients: Tensor) -> Tensor:
        products = gram(gradients)
        count = len(products)
        norms = products.diagonal().clamp(min=0).sqrt()
        averages = torch.ones_like(norms) if self._norms is None else self._norms
        self._norms = self.decay * averages + (1 - self.decay) * norms
        crossed = torch.zeros_like(products)  # products with the gradients of the step before
        if self._before is not None:
            crossed = (gradients @ self._before.T).double().cpu()
        previous = torch.zeros(count) if self._before is None else self._before.norm(dim=1)
        # Row i has the coefficients of the i-th gradient, as it is by now, in the original ones.
        rows = torch.eye(count, dtype=torch.float64)
        for _ in range(2 * count):
            now = rows @ products @ rows.T
            similarities = cosines(now).fill_diagonal_(1.0)
            similarities[now.diagonal() <= 0] = 1.0
            similarities[:, now.diagonal() <= 0] = 1.0
            if float(similarities.min()) >= self.thresholds[2]:
                break
            first, second = divmod(int(similarities.argmin()), count)
            stable = (rows @ crossed).diagonal() / (
                now.diagonal().clamp(min=0).sqrt() * previous.double().cpu() + 1e-8
            )
            self._resolve(rows, now, (first, second), stable, float(similarities[first, second]))
        self._before = gradients.clone()
        return rows.sum(0).to(gradients) @ gradients

    def _resolve(
        self, rows: Tensor, now: Tensor, pair: tuple[int, int], stable: Tensor, cosine: float
    ) -> None:
        """Changes the rows of a pair by the size of its conflict."""
        critical, main, _ = self.thresholds
        first, second = pair
        if cosine >= main:
            before = rows[list(pair)].clone()
            rows[first] -= now[first, second] / now[second, second] * before[1]
            rows[second] -= now[first, second] / now[first, first] * before[0]
            return
        winner, loser = self._arbitrate(now, pair, stable)
        self._winners.append(winner)
        if cosine < critical:
            rows[loser] = 0.0
        else:
            rows[loser] -= now[first, second] / now[winner, winner] * rows[winner]

    def _arbitrate(self, now: Tensor, pair: tuple[int, int], stable: Tensor) -> tuple[int, int]:
        """The winner of a pair, and the one that yields."""
        assert self._norms is not None
        first, second = pair
        window = self._winners.maxlen
        if window and len(self._winners) == window and len(set(self._winners)) == 1:
            if self._winners[0] == first:
                return second, first
            if self._winners[0] == second:
                return first, second
        members = list(pair)
        lengths = now.diagonal()[members].clamp(min=0).sqrt() / (self._norms[members] + 1e-8)
        scores = self.stability * stable[members].clamp(min=0)
        scores += self.strength * lengths / (lengths.sum() + 1e-8)
        return (second, first) if scores[1] > scores[0] else (first, second)

    def state_dict(self) -> dict[str, Any]:
        return {'winners': list(self._winners), 'norms': self._norms, 'before': self._before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._winners.clear()
        self._winners.extend(state['winners'])
        self._norms = None if state['norms'] is None else state['norms'].cpu()
        self._before = state['before']
