"""Damping by the gradient's norm, with plain numbers."""

from __future__ import annotations


class Reference:
    """The factor of the dampings, with windows of some steps."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.gamma = 1.0
        self.first = self.average = self.last = None
        self.length = 0.0
        self.losses: list[float] = []
        self.bounds: list[float] = []
        self.before = None

    def begin(self, norm: float, loss: float) -> None:
        if self.first is None:
            self.first = self.average = self.last = norm
        self.average = 0.9 * self.average + 0.1 * norm
        self.bounds.append(norm**2 * self.length / (8 * self.last))
        self.losses.append(loss)
        self.last = norm

    def refresh(self) -> float:
        if len(self.losses) >= self.window:
            mean = sum(self.losses) / len(self.losses)
            if self.before is not None:
                self.gamma *= 2 if self.before - mean >= sum(self.bounds) else 0.5
            self.before, self.losses, self.bounds = mean, [], []
        share = self.average / self.first
        factor = min(max(share / self.gamma, 1e-3), 1e3)
        self.gamma = share / factor
        return factor
