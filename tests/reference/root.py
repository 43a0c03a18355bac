"""One SGDMBK or AdamWBK step, layer by layer, as spec/algorithms.md 10 writes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .factors import Loss, measure
from .nkfac import Factor, ReferenceNKFAC, power_iteration


def newton_schulz(matrix: Tensor, steps: int) -> Tensor:
    """A^-1/2 by coupled Newton-Schulz steps (1.1)."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    y, z = matrix / matrix.trace(), eye
    for _ in range(steps):
        t = (3 * eye - z @ y) / 2
        y, z = y @ t, t @ z
    return z / matrix.trace().sqrt()


class Root(Factor):
    """One running factor of one block, and its inverse root."""

    def merge(self, sample: Tensor) -> None:
        decay = self.settings['stat_decay']
        self.running = decay * self.running + (1 - decay) * sample

    def refresh(self, damping: float) -> None:
        eye = torch.eye(len(self.running), dtype=self.running.dtype)
        damped = self.running + damping * power_iteration(self.running) * eye
        if self.settings['solver'] == 'eigh':
            vectors, values, _ = torch.linalg.svd(damped)
            self.inverse = vectors @ (values**-0.5).diag() @ vectors.t()
        else:
            self.inverse = newton_schulz(damped, self.settings['root_steps'])
        self.refreshes += 1


class ReferenceRoot(ReferenceNKFAC):
    """SGDMBK on a float64 model without hooks; AdamWBK where `betas` are given."""

    def __init__(self, model: nn.Module, lr: float, **settings: object) -> None:
        defaults = dict(stat_decay=0.9, damping=1e-5, solver='newton_schulz', root_steps=10)
        super().__init__(model, lr, **defaults | settings)

    def _capture(self, weight: nn.Parameter, joint: bool, losses: list[Loss]) -> None:
        right, left, rows = measure(self.model, losses, weight, joint)
        if rows == 0 or left.norm() == 0:
            return
        sides = self.factors.setdefault(
            weight, ([Root(self.settings) for _ in left], [Root(self.settings) for _ in right])
        )
        for factors, samples in zip(sides, (left, right), strict=True):
            for factor, sample in zip(factors, samples, strict=True):
                factor.merge(sample)
