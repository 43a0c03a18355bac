"""Seconds that a training takes for a number of iterations, from short runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

#: Part of a measured run whose pace later iterations have. It has no early refresh: of 100
#: iterations, the last one comes after 64.
LATE = 1 / 3


@dataclass(frozen=True)
class Pace:
    """Seconds of training against iterations.

    Early iterations may take longer than later ones, because curvature is measured more often.
    Iterations after the measured ones are therefore counted at the pace of the last of these. They
    have no refresh, which later iterations have every 200 steps or more.

    Attributes:
        iterations: Increasing numbers of iterations, at least one; fractions are allowed.
        seconds: Seconds of training until each of them.
    """

    iterations: Sequence[float]
    seconds: Sequence[float]

    @classmethod
    def of(cls, rounds: Sequence[Sequence[float]]) -> Pace:
        """Pace of the fastest of some runs, from the seconds of each iteration."""
        seconds = list(accumulate(min(rounds, key=sum)))
        return cls(range(1, len(seconds) + 1), seconds)

    @property
    def mean(self) -> float:
        """Seconds of an iteration in the measured run."""
        return self.seconds[-1] / self.iterations[-1]

    @property
    def late(self) -> float:
        """Seconds of an iteration after the measured ones."""
        end, begin = self.iterations[-1], (1 - LATE) * self.iterations[-1]
        before = _interpolate(begin, [0, *self.iterations], [0.0, *self.seconds])
        return (self.seconds[-1] - before) / (end - begin)

    @property
    def outline(self) -> Pace:
        """A pace of few points: every tenth iteration, and where the late ones begin.

        `late` is the same, and `until` at every tenth iteration.
        """
        end = self.iterations[-1]
        steps = sorted({*range(10, int(end), 10), (1 - LATE) * end, end})
        return Pace(steps, [self.until(step) for step in steps])

    def until(self, iterations: float) -> float:
        """Seconds for a number of iterations."""
        within = _interpolate(iterations, [0, *self.iterations], [0.0, *self.seconds])
        return within + max(0.0, iterations - self.iterations[-1]) * self.late

    def reach(self, seconds: float) -> float:
        """Iterations in a number of seconds."""
        within = _interpolate(seconds, [0.0, *self.seconds], [0, *self.iterations])
        return within + max(0.0, seconds - self.seconds[-1]) / self.late


def _interpolate(at: float, places: Sequence[float], values: Sequence[float]) -> float:
    """Value at a place between others; beyond them that of the nearest."""
    import numpy as np  # help texts must come without an environment

    return float(np.interp(at, places, values))
