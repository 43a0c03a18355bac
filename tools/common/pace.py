"""Seconds that a training takes for a number of iterations, from short runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pace:
    """Seconds of training against iterations.

    Early iterations may take longer than later ones, because curvature is measured more often.
    Later ones are therefore counted at the rate of the last half of the measured run.

    Attributes:
        iterations: Increasing numbers of iterations, at least one.
        seconds: Seconds of training until each of them.
    """

    iterations: Sequence[int]
    seconds: Sequence[float]

    @classmethod
    def of(cls, rounds: Sequence[Sequence[float]]) -> Pace:
        """Mean pace of some runs of equal length, from the seconds of each iteration."""
        seconds = np.mean(rounds, axis=0).cumsum().tolist()
        return cls(range(1, len(seconds) + 1), seconds)

    @property
    def mean(self) -> float:
        """Seconds of an iteration in the measured run."""
        return self.seconds[-1] / self.iterations[-1]

    @property
    def late(self) -> float:
        """Seconds of an iteration in the last half of the measured run."""
        end, half = self.iterations[-1], self.iterations[-1] / 2
        return (self.seconds[-1] - self.until(half)) / (end - half)

    def until(self, iterations: float) -> float:
        """Seconds for a number of iterations."""
        beyond = max(0.0, iterations - self.iterations[-1])
        within = np.interp(iterations, [0, *self.iterations], [0.0, *self.seconds])
        return float(within) + (beyond * self.late if beyond else 0.0)

    def reach(self, seconds: float) -> float:
        """Iterations in a number of seconds."""
        beyond = max(0.0, seconds - self.seconds[-1])
        within = np.interp(seconds, [0.0, *self.seconds], [0, *self.iterations])
        return float(within) + (beyond / self.late if beyond else 0.0)
