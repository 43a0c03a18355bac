"""Search for intervals at which captures and refreshes take a given share of the time."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from ..curvature import Layer
from ..distributed import share_objects, world_size
from ..preconditioners import Preconditioner

logger = logging.getLogger('mmprecond')

#: Intervals of captures and refreshes while the search measures times; other periodic work of a
#: loop (logs, hooks) seldom has a period of 7.
TRIAL = (7, 14)
#: Bounds of the search: the shortest intervals that our experiments took, and the longest ones of
#: published numbers.
SHORTEST, LONGEST = (5, 25), (200, 2000)
#: First steps, which are slower than others and do not count.
IGNORED = 4
#: Steps of each kind that the search waits for, and the number of steps that ends it anyway: given
#: intervals can rule out a kind.
NEEDED, LIMIT = {'plain': 10, 'capture': 3, 'refresh': 2}, 64


@dataclass(frozen=True)
class Times:
    """Seconds of a plain iteration, and what a capture and a refresh add to it."""

    plain: float
    capture: float
    refresh: float

    def share(self, intervals: tuple[int, int]) -> float:
        """Time of captures and refreshes at some intervals, as a share of a plain iteration."""
        return (self.capture / intervals[0] + self.refresh / intervals[1]) / self.plain


@dataclass(frozen=True)
class _Step:
    """Clock readings at the beginning and the end of an optimizer's step."""

    kind: str
    begin: Any
    end: Any


class OverheadSearch:
    """Measures iterations, and chooses intervals by their times.

    The first rank decides for all. Where every step captures, a capture is a part of a plain
    iteration. Where every capture comes with a refresh, it is a part of the refresh.

    Args:
        share: Largest share of a plain iteration that captures and refreshes may add per iteration.
        methods: Preconditioner of each layer. An interval that the user gave to all is not chosen.

    Raises:
        ValueError: If both intervals are given.

    Attributes:
        found: Intervals of captures and refreshes, or None during the search.
    """

    def __init__(self, share: float, methods: Mapping[Layer, Preconditioner]) -> None:
        self.share = share
        self._given = _common_intervals(methods.values())
        self.found: tuple[int, int] | None = None
        both = {'stat_interval', 'refresh_interval'}
        if all(both <= method.given for method in methods.values()):
            raise ValueError(
                f'overhead={share:g} chooses intervals, but stat_interval and refresh_interval '
                'are given; leave one of them out'
            )
        self._weight = next(iter(methods)).weight
        self._device = self._weight.device
        self._steps: list[_Step] = []
        self._begin: Any = None

    def begin(self) -> None:
        """Starts an optimizer's step, after the backward pass."""
        if not self._steps:
            self._device = self._weight.device  # the model may have been moved
        self._begin = self._mark() if self.found is None else None

    def end(self, captured: bool, refreshed: bool) -> tuple[int, int] | None:
        """Ends the optimizer's step.

        Returns:
            Intervals from the next step on: after the first step `TRIAL`, at the end of the search
            those that it found, else None.
        """
        if self.found is not None or self._begin is None:
            return None
        kind = 'refresh' if refreshed else 'capture' if captured else 'plain'
        self._steps.append(_Step(kind, self._begin, self._mark()))
        self._begin = None
        kinds = [step.kind for step in self._steps[IGNORED:]]
        enough = all(kinds.count(kind) >= number for kind, number in NEEDED.items())
        if enough or len(kinds) >= LIMIT:
            self.found = self.choose()
            self._steps.clear()
            return self.found
        return TRIAL if len(self._steps) == 1 else None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but clock readings, which mean nothing in a copy: it measures anew."""
        return {**self.__dict__, '_steps': [], '_begin': None}

    def state_dict(self) -> dict[str, Any]:
        """Share and intervals under the key 'overhead'; an empty dict during the search."""
        if self.found is None:
            return {}
        return {'overhead': {'share': self.share, 'intervals': list(self.found)}}

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> tuple[int, int] | None:
        """Takes the intervals that a saved run found for the same share, and returns them."""
        known = (saved or {}).get('overhead')
        if not isinstance(known, dict) or known.get('share') != self.share:
            return None
        intervals: Any = known.get('intervals')
        if not _are_intervals(intervals):
            logger.warning('overhead: saved intervals %r are corrupt; measured anew', intervals)
            return None
        self.found = intervals[0], intervals[1]
        self._steps.clear()
        logger.info(
            'overhead=%g: captures every %d and refreshes every %d steps, as the saved run found',
            self.share,
            *self.found,
        )
        return self.found

    def times(self) -> Times:
        """Median times of the steps; waits for the device once."""
        steps = self._steps
        if self._device.type == 'cuda':
            steps[-1].end.synchronize()
        whole: dict[str, list[float]] = {}
        inside: dict[str, list[float]] = {}
        for last, step in zip(steps[IGNORED - 1 :], steps[IGNORED:], strict=False):
            whole.setdefault(step.kind, []).append(_seconds(last.end, step.end))
            inside.setdefault(step.kind, []).append(_seconds(step.begin, step.end))
        iteration = {kind: median(seconds) for kind, seconds in whole.items()}
        step_alone = {kind: median(seconds) for kind, seconds in inside.items()}
        plain = iteration.get('plain', min(iteration.values()))
        capture = max(0.0, iteration.get('capture', plain) - plain)
        if 'refresh' not in iteration:
            refresh = 0.0
        elif 'capture' in iteration:
            refresh = step_alone['refresh'] - step_alone['capture']
        else:
            refresh = iteration['refresh'] - plain
        return Times(plain, capture, max(0.0, refresh))

    def choose(self) -> tuple[int, int]:
        """Intervals of captures and refreshes, equal on all ranks, with a line in the log."""
        times = self.times()
        chosen = choose_intervals(times, self.share, self._given)
        if world_size() > 1:
            chosen, times = share_objects([(chosen, times)], [0])[0]
        added = times.share(chosen)
        logger.info(
            'overhead=%g: a plain iteration takes %.3g s, a capture %.3g s and a refresh %.3g s '
            'more; at intervals of %d and %d they add %.1f %%',
            self.share,
            times.plain,
            times.capture,
            times.refresh,
            *chosen,
            100 * added,
        )
        if added > 1.01 * self.share:
            logger.warning(
                'overhead=%g is exceeded at %d and %d, the longest intervals allowed; choose '
                "input_factor='kernel', a smaller max_rows, or sharding='refresh' on several ranks",
                self.share,
                *chosen,
            )
        return chosen

    def _mark(self) -> Any:
        if self._device.type != 'cuda':
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _seconds(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return float(end - begin)
    return float(begin.elapsed_time(end)) / 1000


def choose_intervals(
    times: Times, share: float, given: tuple[int | None, int | None] = (None, None)
) -> tuple[int, int]:
    """Shortest intervals of captures and refreshes within a share of a plain iteration.

    Captures get half of the share. Refreshes get what captures leave, which is more than the other
    half where captures come as often as the bound allows. What refreshes leave goes to captures.

    Args:
        times: Measured times.
        share: The share.
        given: Intervals that are not to be chosen, or None.

    Returns:
        The intervals. Chosen ones are within `SHORTEST` and `LONGEST`, and the second is a multiple
        of the first.
    """
    budget = share * times.plain
    capture = given[0] or _bounded(times.capture, budget / 2, 0)
    refresh = given[1] or _bounded(times.refresh, budget - times.capture / capture, 1)
    capture = given[0] or _bounded(times.capture, budget - times.refresh / refresh, 0)
    if given[1]:
        return _divisor(refresh, capture), refresh
    return capture, min(-(-refresh // capture) * capture, LONGEST[1] // capture * capture)


def _bounded(cost: float, budget: float, kind: int) -> int:
    """Interval at which a cost is within a budget per iteration, within the bounds."""
    if not cost:
        return SHORTEST[kind]
    ratio = cost / budget if budget > 0 else LONGEST[kind]
    needed = math.ceil(ratio * (1 - 1e-9))  # rounding errors are no reason for one step more
    return max(SHORTEST[kind], min(needed, LONGEST[kind]))


def _are_intervals(value: Any) -> bool:
    """True for two positive integers, of which the first divides the second."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    counts = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in value)
    return counts and value[1] % value[0] == 0


def trial_intervals(method: Preconditioner) -> tuple[int, int]:
    """Intervals of a method during the search: every second capture comes without a refresh."""
    capture = method.stat_interval if 'stat_interval' in method.given else TRIAL[0]
    return capture, 2 * capture


def _divisor(number: int, least: int) -> int:
    """The least divisor that is at least `least`; the number itself if there is none."""
    return next(k for k in range(min(least, number), number + 1) if number % k == 0)


def with_intervals(method: Preconditioner, intervals: tuple[int, int]) -> Preconditioner:
    """The method at other intervals; those that the user gave stay.

    A given interval of refreshes has the shortest divisor that is no shorter than the interval of
    captures. To a given interval of captures belongs the next multiple.
    """
    if method.precomputed:
        return method
    capture, refresh = trial_intervals(method) if intervals == TRIAL else intervals
    if 'refresh_interval' in method.given:
        refresh = method.refresh_interval
        capture = _divisor(refresh, capture)
    if 'stat_interval' in method.given:
        capture = method.stat_interval
        if 'refresh_interval' not in method.given:
            refresh = -(-refresh // capture) * capture
    return replace(method, stat_interval=capture, refresh_interval=refresh)


def _common_intervals(methods: Collection[Preconditioner]) -> tuple[int | None, int | None]:
    """Intervals that the user gave to all methods, or None."""
    common = [
        values.pop() if len(values) == 1 else None
        for name in ('stat_interval', 'refresh_interval')
        if (values := {getattr(m, name) if name in m.given else None for m in methods})
    ]
    return common[0], common[1]
