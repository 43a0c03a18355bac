"""Surgeries on explicit vectors in float64, step by step as their papers say."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pcgrad(gradients: list[Tensor], orders: list[list[int]]) -> Tensor:
    """Sum of the projected gradients; orders[i] is the order in which the i-th meets all."""
    projected = []
    for i, gradient in enumerate(gradients):
        current = gradient.clone()
        for j in orders[i]:
            other = gradients[j]
            if j != i and float(current @ other) < 0:
                current = current - (current @ other) / (other @ other) * other
        projected.append(current)
    return torch.stack(projected).sum(0)


class GCondReference:
    """GCond's four zones with whole vectors."""

    def __init__(self, count: int) -> None:
        self.averages = [1.0] * count
        self.before: list[Tensor] | None = None
        self.winners: list[int] = []

    def __call__(self, gradients: list[Tensor]) -> Tensor:
        now = [g.clone() for g in gradients]
        count = len(now)
        self.averages = [
            0.95 * a + 0.05 * float(g.norm()) for a, g in zip(self.averages, now, strict=True)
        ]
        for _ in range(2 * count):
            worst, pair = 0.0, None
            for i in range(count):
                for j in range(i + 1, count):
                    if now[i].norm() > 0 and now[j].norm() > 0:
                        cosine = float(now[i] @ now[j] / now[i].norm() / now[j].norm())
                        if cosine < worst:
                            worst, pair = cosine, (i, j)
            if pair is None:
                break
            i, j = pair
            if worst >= -0.5:
                first = now[i] - (now[i] @ now[j]) / (now[j] @ now[j]) * now[j]
                second = now[j] - (now[i] @ now[j]) / (now[i] @ now[i]) * now[i]
                now[i], now[j] = first, second
                continue
            winner, loser = self.arbitrate(now, i, j)
            self.winners.append(winner)
            if worst < -0.8:
                now[loser] = torch.zeros_like(now[loser])
            else:
                along = (now[loser] @ now[winner]) / (now[winner] @ now[winner])
                now[loser] = now[loser] - along * now[winner]
        self.before = gradients
        return torch.stack(now).sum(0)

    def arbitrate(self, now: list[Tensor], i: int, j: int) -> tuple[int, int]:
        recent = self.winners[-3:]
        if recent == [i] * 3:
            return j, i
        if recent == [j] * 3:
            return i, j
        strengths = [float(now[k].norm()) / (self.averages[k] + 1e-8) for k in (i, j)]
        scores = [0.2 * s / (sum(strengths) + 1e-8) for s in strengths]
        if self.before is not None:
            for position, k in enumerate((i, j)):
                cosine = now[k] @ self.before[k] / (now[k].norm() * self.before[k].norm() + 1e-8)
                scores[position] += 0.8 * max(float(cosine), 0.0)
        return (j, i) if scores[1] > scores[0] else (i, j)


class SAMGSReference:
    """SAM-GS with whole vectors and explicit sums over pairs."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.m: list[Tensor] | None = None
        self.v, self.t = 0.0, 0

    def __call__(self, gradients: list[Tensor]) -> Tensor:
        norms = [float(g.norm()) for g in gradients]
        pairs = [
            2 * norms[i] * norms[j] / (norms[i] ** 2 + norms[j] ** 2)
            for i in range(len(norms))
            for j in range(i + 1, len(norms))
        ]
        similarity = sum(pairs) / len(pairs)
        self.t += 1
        before = self.m or [torch.zeros_like(g) for g in gradients]
        self.m = [0.9 * m + 0.1 * g for m, g in zip(before, gradients, strict=True)]
        self.v = 0.99 * self.v + 0.01 * (1 - similarity) ** 2 + 1e-8
        if similarity < self.threshold:
            mean = sum(norms) / len(norms)
            return torch.stack([g / n * mean for g, n in zip(gradients, norms, strict=True)]).sum(0)
        root = math.sqrt(self.v / (1 - 0.99**self.t))
        terms = [
            g * (m / (1 - 0.9**self.t)).abs() / root for g, m in zip(gradients, self.m, strict=True)
        ]
        return torch.stack(terms).sum(0)
