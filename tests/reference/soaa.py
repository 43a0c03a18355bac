"""SOAA from all gradients and losses so far, tensor by tensor, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .rules import weighted_mean


class ReferenceSOAA:
    """Remembers everything; averages are weighted means of what was seen.

    Attributes:
        d: The trust radius of the next step.
    """

    def __init__(
        self,
        params: list[Tensor],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        gamma: float,
        d: float,
        total: int,
        per_parameter: bool = False,
    ) -> None:
        self.params, self.lr, self.betas, self.eps = params, lr, betas, eps
        self.weight_decay, self.gamma, self.d, self.total = weight_decay, gamma, d, total
        self.per_parameter = per_parameter
        self.gradients: list[list[Tensor]] = [[] for _ in params]
        self.losses: list[float] = []
        self.predicted = 0.0
        self.fisher_wins = 0

    @torch.no_grad()
    def step(self, gradients: list[Tensor], loss: float) -> None:
        for seen, g in zip(self.gradients, gradients, strict=True):
            seen.append(g.clone())
        means = [weighted_mean(seen, self.betas[0]) for seen in self.gradients]
        squares = [weighted_mean([g**2 for g in seen], self.betas[1]) for seen in self.gradients]
        ratios = [
            self.ratio([m], [v]) if self.per_parameter else self.ratio(means, squares)
            for m, v in zip(means, squares, strict=True)
        ]
        predicted = 0.0
        for p, m, v, ratio in zip(self.params, means, squares, ratios, strict=True):
            fisher = (1 + ratio) * v
            self.fisher_wins += int((self.d * fisher > v.sqrt()).sum())
            u = self.d * m / (torch.maximum(self.d * fisher, v.sqrt()) + self.eps)
            p -= self.lr * (self.weight_decay * p + u)
            predicted += self.lr * float((m * u).sum() - (v * u * u).sum() / 2)
        self.losses.append(loss)
        average = float(
            weighted_mean(
                [torch.tensor(x, dtype=torch.float64) for x in self.losses], self.betas[0]
            )
        )
        q = (len(self.losses) - 1) / self.total
        wanted = self.d * (average - loss) / max(self.predicted, self.eps)
        self.d = min(1 + self.gamma**q, max((1 - self.gamma) ** q, wanted))
        self.predicted = predicted

    def ratio(self, means: list[Tensor], squares: list[Tensor]) -> float:
        above = sum(float((m**2).sum()) for m in means)
        return above / sum(float((v + self.eps).sum()) for v in squares)
