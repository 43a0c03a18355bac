"""RAMDA filter by filter in float64; the inner problem by many proximal gradient steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def minimizer(linear: Tensor, diagonal: Tensor, weight: float, steps: int = 20000) -> Tensor:
    """argmin of x' D x / 2 - b' x + weight |x| for one row."""
    x = torch.zeros_like(linear)
    size = 1 / float(diagonal.max())
    for _ in range(steps):
        moved = x - size * (diagonal * x - linear)
        length = float(moved.norm())
        x = moved * max(0.0, 1 - size * weight / length) if length else moved
    return x


class Reference:
    """One weight of shape (filters, ...)."""

    def __init__(self, weight: Tensor, momentum: float, sparsity: float) -> None:
        self.p, self.momentum, self.sparsity = weight.clone(), momentum, sparsity
        self.eps, self.highest = 1e-6, 0.0
        self.restart()

    def restart(self) -> None:
        self.start, self.t, self.a = self.p.clone(), 0, 0.0
        self.sum, self.squares = torch.zeros_like(self.p), torch.zeros_like(self.p)

    def step(self, gradient: Tensor, rate: float) -> None:
        if self.highest and rate <= 0.1 * self.highest:
            self.eps *= rate / self.highest
            self.highest = 0.0
            self.restart()
        self.highest = max(self.highest, rate)
        self.t += 1
        scale = rate * math.sqrt(self.t)
        self.a += scale
        self.sum += scale * gradient
        self.squares += scale * gradient**2
        metric = self.squares ** (1 / 3) + self.eps
        target = torch.zeros_like(self.p)
        for k in range(len(self.p)):
            d, g, p0 = metric[k].flatten(), self.sum[k].flatten(), self.start[k].flatten()
            weight = self.a * self.sparsity * math.sqrt(len(d))
            target[k] = minimizer(d * p0 - g, d, weight).view_as(target[k])
        self.p = (1 - self.momentum) * self.p + self.momentum * target
