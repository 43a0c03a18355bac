"""The length of the run as an input of an optimizer."""

from __future__ import annotations

from ..checks import check_count


class LengthInput:
    """Mixin with the number of steps of the run, which the user or MMEngine's wrapper sets."""

    _requested_steps: int | None = None
    _planned_steps: int | None = None

    @property
    def total_steps(self) -> int | None:
        """Number of optimizer steps of the run, or None if it is unknown."""
        return self._planned_steps if self._requested_steps is None else self._requested_steps

    def plan_steps(self, count: int) -> None:
        """Sets the number of optimizer steps of the run; the user's `total_steps` has priority."""
        self._planned_steps = count

    def _request_steps(self, count: int | None) -> None:
        """Takes the user's `total_steps`; raises ValueError if it is no count."""
        if count is not None:
            check_count('total_steps', count)
        self._requested_steps = count
