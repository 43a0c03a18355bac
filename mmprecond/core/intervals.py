"""Intervals that change during training: by a plan, or by a search for a share of the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..curvature import Layer
from ..preconditioners import Preconditioner
from .overhead import OverheadSearch, with_intervals

#: A step, and the intervals of captures and refreshes from that step on.
PlannedIntervals = tuple[int, int, int]


def check_plan(plan: Sequence[PlannedIntervals]) -> None:
    """Raises ValueError unless a plan has increasing steps, each with intervals that fit."""
    if not isinstance(plan, (list, tuple)):
        raise ValueError(
            f'intervals={plan!r} is no list; give entries (step, stat_interval, refresh_interval)'
        )
    last = -1
    for entry in plan:
        whole = isinstance(entry, (list, tuple)) and len(entry) == 3
        whole = whole and all(type(number) is int for number in entry)
        if not whole or entry[0] <= last or entry[1] < 1 or entry[2] < 1 or entry[2] % entry[1]:
            raise ValueError(
                f'intervals has {entry!r}; give entries (step, stat_interval, refresh_interval) '
                'of whole numbers with increasing steps, the third a multiple of the second'
            )
        last = entry[0]


class IntervalControl:
    """Chooses the intervals of all methods for the next step.

    Args:
        plan: Entries in the order of their steps; methods have their own intervals before.
        share: Share of the time for a search (see `OverheadSearch`), or None.
        start: First step that may capture.
        methods: Preconditioner of each layer.
    """

    def __init__(
        self,
        plan: Sequence[PlannedIntervals],
        share: float | None,
        start: int,
        methods: Mapping[Layer, Preconditioner],
    ) -> None:
        self._plan = list(plan)
        self._search = None if share is None else OverheadSearch(share, methods)
        self._start = start
        self._kind = False, False  # whether the step captured and refreshed
        self._intervals: tuple[int, int] | None = None

    @property
    def searching(self) -> bool:
        """True while times are measured."""
        return self._search is not None and self._search.found is None

    def applied(self, method: Preconditioner) -> Preconditioner:
        """A method, given as at construction, at the intervals of now."""
        if self._intervals is None or method.precomputed:
            return method
        if self._search is not None:
            return with_intervals(method, self._intervals)
        capture, refresh = self._intervals
        return replace(method, stat_interval=capture, refresh_interval=refresh)

    def begin(self, step: int) -> None:
        """Starts an optimizer's step, after the backward pass."""
        if self._search is not None and step >= self._start:
            self._search.begin()

    def note(self, captured: bool, refreshed: bool) -> None:
        """Takes note of a capture and a refresh in this step."""
        self._kind = captured, refreshed

    def end(self, step: int) -> bool:
        """Ends a step of the optimizer.

        Args:
            step: The next step.

        Returns:
            True if that step has other intervals.
        """
        if self._search is not None:
            return self._take(self._search.end(*self._kind) or self._intervals)
        planned = [entry for entry in self._plan if entry[0] <= step]
        return self._take(planned[-1][1:] if planned else None)

    def state_dict(self) -> dict[str, Any]:
        """Intervals that a search found; empty without one."""
        return self._search.state_dict() if self._search is not None else {}

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> bool:
        """Takes the intervals that a saved run found; returns True if they change."""
        if self._search is None:
            return False  # a plan follows at `end`
        return self._take(self._search.load_state_dict(saved) or self._intervals)

    def _take(self, intervals: tuple[int, int] | None) -> bool:
        if intervals == self._intervals:
            return False
        self._intervals = intervals
        return True
