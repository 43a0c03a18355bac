"""PCGrad: each gradient loses its component along those that it points against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Aggregator, gram


class PCGrad(Aggregator):
    """Projecting conflicting gradients.

    Each gradient g_i is compared with the others in a random order. Where its product with g_j is
    negative, it is projected onto the plane that is normal to g_j:
    ``g_i -= (g_i.g_j) / |g_j|^2 g_j``, with the original g_j. The result is the sum.

    Source: Gradient Surgery for Multi-Task Learning (arXiv 2001.06782), Algorithm 1.

    Args:
        seed: Seed of the orders; default: 0.
    """

    def __init__(self, seed: int = 0) -> None:
        self._draws = torch.Generator().manual_seed(seed)

    def combine(self, gradients: Tensor) -> Tensor:
        products = gram(gradients)
        count = len(products)
        # Row i has the coefficients of the i-th projected gradient in the original ones.
        rows = torch.eye(count, dtype=torch.float64)
        for i in range(count):
            for j in torch.randperm(count, generator=self._draws).tolist():
                product = rows[i] @ products[:, j]
                if j != i and product < 0 < products[j, j]:
                    rows[i, j] -= product / products[j, j]
        return rows.sum(0).to(gradients) @ gradients

    def state_dict(self) -> dict[str, Any]:
        return {'draws': self._draws.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._draws.set_state(state['draws'].cpu())
