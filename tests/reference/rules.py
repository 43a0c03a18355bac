"""First-order rules one parameter at a time, from all directions so far, in float64.

A moving average from zero with bias correction is a weighted mean of what it has seen, with weights
beta^age: no running quantity is kept here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def weighted_mean(history: list[Tensor], beta: float) -> Tensor:
    """Mean of a history with weights beta^age; the last one has age 0."""
    weights = [beta**age for age in reversed(range(len(history)))]
    total: Any = sum(weight * value for weight, value in zip(weights, history, strict=True))
    return total / sum(weights)


class ReferenceRule:
    """Remembers all directions of each parameter."""

    def __init__(self) -> None:
        self.history: dict[Tensor, list[Tensor]] = {}

    @torch.no_grad()
    def step(self, parameter: Tensor, direction: Tensor, lr: float, weight_decay: float) -> None:
        seen = self.history.setdefault(parameter, [])
        seen.append(direction.detach().double().clone())
        parameter.copy_(self.moved(parameter.double(), seen, lr, weight_decay))

    def moved(self, p: Tensor, seen: list[Tensor], lr: float, weight_decay: float) -> Tensor:
        raise NotImplementedError


class ReferenceSGDM(ReferenceRule):
    """Heavy ball: p -= lr * buf with buf = sum of momentum^age (direction + weight_decay p).

    Nesterov's: p -= lr (the newest term of that sum + momentum buf).
    """

    def __init__(self, momentum: float, nesterov: bool = False) -> None:
        super().__init__()
        self.momentum, self.nesterov = momentum, nesterov

    def moved(self, p: Tensor, seen: list[Tensor], lr: float, weight_decay: float) -> Tensor:
        seen[-1] += weight_decay * p  # each with the parameter of its own step
        ages = reversed(range(len(seen)))
        buffer = sum(self.momentum**age * d for age, d in zip(ages, seen, strict=True))
        return p - lr * (seen[-1] + self.momentum * buffer if self.nesterov else buffer)


class ReferenceAdamW(ReferenceRule):
    """Adam with decay lr weight_decay p apart from it (arXiv 1711.05101, Algorithm 2)."""

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        super().__init__()
        self.betas, self.eps = betas, eps

    def moved(self, p: Tensor, seen: list[Tensor], lr: float, weight_decay: float) -> Tensor:
        mean = weighted_mean(seen, self.betas[0])
        square = weighted_mean([d**2 for d in seen], self.betas[1])
        return p - lr * (mean / (square.sqrt() + self.eps) + weight_decay * p)


class ReferenceAdan(ReferenceRule):
    """Adan (arXiv 2208.06677), Algorithm 1 without restart.

    m, v and n average g, its change, and (g + (1 - b2) change)^2, with weight b of the new value;
    ``p <- (p - lr (m + (1 - b2) v) / (sqrt(n) + eps)) / (1 + lr weight_decay)``. The averages are
    bias-corrected and b = 1 - beta, as in the authors' code.
    """

    def __init__(self, betas: tuple[float, float, float], eps: float) -> None:
        super().__init__()
        self.news = tuple(1 - beta for beta in betas)
        self.eps = eps

    def moved(self, p: Tensor, seen: list[Tensor], lr: float, weight_decay: float) -> Tensor:
        b1, b2, b3 = self.news
        changes = [new - old for new, old in zip(seen, [seen[0], *seen], strict=False)]
        ahead = [(g + (1 - b2) * change) ** 2 for g, change in zip(seen, changes, strict=True)]
        m, v, n = (
            weighted_mean(values, 1 - b) for values, b in ((seen, b1), (changes, b2), (ahead, b3))
        )
        return (p - lr * (m + (1 - b2) * v) / (n.sqrt() + self.eps)) / (1 + lr * weight_decay)


class ReferenceAdaGrad(ReferenceRule):
    """AdaGrad (Duchi et al., 2011), with decoupled decay."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def moved(self, p: Tensor, seen: list[Tensor], lr: float, weight_decay: float) -> Tensor:
        total: Any = sum(d**2 for d in seen)
        return p - lr * (seen[-1] / (total.sqrt() + self.eps) + weight_decay * p)


def rectified(mean: Tensor, square: Tensor, steps: int, beta: float, eps: float) -> Tensor:
    """RAdam's direction (arXiv 1908.03265, Algorithm 2) from bias-corrected moments.

    As in torch, eps is added to the root of the second moment before its bias correction.
    """
    longest = 2 / (1 - beta) - 1
    length = longest - 2 * steps * beta**steps / (1 - beta**steps)
    if length <= 5:
        return mean
    factor = (length - 4) * (length - 2) * longest
    factor /= (longest - 4) * (longest - 2) * length
    corrected = (1 - beta**steps) ** 0.5
    return mean * factor**0.5 * corrected / ((square * corrected**2).sqrt() + eps)


class ReferenceRAdam(ReferenceRule):
    """RAdam, with decoupled decay."""

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        super().__init__()
        self.betas, self.eps = betas, eps

    def moved(self, p: Tensor, seen: list[Tensor], lr: float, weight_decay: float) -> Tensor:
        mean = weighted_mean(seen, self.betas[0])
        square = weighted_mean([d**2 for d in seen], self.betas[1])
        direction = rectified(mean, square, len(seen), self.betas[1], self.eps)
        return p - lr * (direction + weight_decay * p)


def deviations(history: list[Tensor], beta: float) -> list[Tensor]:
    """Difference between each direction and the momentum of its step, which includes it."""
    found = []
    for k in range(len(history)):
        so_far = history[: k + 1]
        momentum = (1 - beta ** (k + 1)) * weighted_mean(so_far, beta)
        found.append(history[k] - momentum)
    return found


def believed(mean: Tensor, square: Tensor, beta: float, eps: float) -> Tensor:
    """AdaBelief's direction; eps joins the average at every step, and is added to the root."""
    joined = eps / (1 - beta)  # the bias-corrected average of eps / (1 - beta)
    return mean / ((square + joined).sqrt() + eps)


class ReferenceAdaBelief(ReferenceRule):
    """AdaBelief (arXiv 2010.07468), with decoupled decay."""

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        super().__init__()
        self.betas, self.eps = betas, eps

    def moved(self, p: Tensor, seen: list[Tensor], lr: float, weight_decay: float) -> Tensor:
        mean = weighted_mean(seen, self.betas[0])
        square = weighted_mean([d**2 for d in deviations(seen, self.betas[0])], self.betas[1])
        direction = believed(mean, square, self.betas[1], self.eps)
        return p - lr * (direction + weight_decay * p)
