"""Schedule of captures and refreshes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..curvature import Layer
from ..distributed import longest_first
from ..preconditioners import Preconditioner
from .stack import LayerStack


class Schedule:
    """Steps at which layers are measured and refreshed, by intervals, phases and offsets.

    Args:
        methods: Preconditioner of each layer.
        stagger: Whether to give layers different offsets within an interval.
        start: First step that measures; intervals count from there.
    """

    def __init__(
        self, methods: Mapping[Layer, Preconditioner], stagger: bool, start: int = 0
    ) -> None:
        self._given_start = self._start = start
        self._recaptured: set[Layer] = set()
        self.plan(methods, stagger)

    def plan(self, methods: Mapping[Layer, Preconditioner], stagger: bool) -> None:
        """Takes methods with other intervals."""
        self._offsets = assign_offsets(methods) if stagger else {}

    def restart(self, step: int) -> None:
        """Counts intervals from a step on, if that is later than the given start."""
        self._start = max(self._given_start, step)

    def state_dict(self) -> dict[str, Any]:
        """First step that measures, if it is not the given one."""
        return {} if self._start == self._given_start else {'start': self._start}

    def captures(self, stack: LayerStack, layer: Layer, step: int) -> bool:
        """True if a layer is measured at a step.

        A layer without statistics follows `stat_interval`, even if `capture_interval` is longer.
        """
        if stack.method.precomputed or step < self._start:
            return False
        method = stack.method
        interval = method.capture_interval if stack.holds(layer) else method.stat_interval
        count = self._count(method, step, layer)
        return layer in self._recaptured or count % interval == 0 or method.is_early(count)

    def captures_others(self, method: Preconditioner, step: int) -> bool:
        """True if a step measures, by a method's intervals, what is outside layers (norms)."""
        count = self._count(method, step)
        due = count % method.stat_interval == 0 or method.is_early(count)
        return due and step >= self._start

    def refreshes(self, stack: LayerStack, step: int) -> list[int]:
        """Positions in a stack to refresh at a step: on schedule, or for the first time.

        With `refresh_on_first_sample` the first refresh comes as soon as there are statistics.
        """
        if step < self._start:
            return []
        at_once = stack.method.refresh_on_first_sample
        return [
            k
            for k, member in enumerate(stack.members)
            if at_once and member.waiting or self._is_due(stack, member.layer, step)
        ]

    def stacks_to_refresh(
        self, stacks: Iterable[LayerStack], step: int
    ) -> list[tuple[LayerStack, list[int]]]:
        """Stacks with the positions that are due, or that have statistics but no operator."""
        return [
            (stack, positions) for stack in stacks if (positions := self.refreshes(stack, step))
        ]

    def recapture(self, layers: Iterable[Layer]) -> None:
        """Schedules layers to be measured at the next step, in place of those of earlier calls."""
        self._recaptured = set(layers)

    def _count(self, method: Preconditioner, step: int, layer: Layer | None = None) -> int:
        """Count of a step, for a layer's offset; it is due where an interval divides the count."""
        offset = 0 if layer is None else self._offsets.get(layer, 0)
        return step - self._start + method.count_from - offset

    def _is_due(self, stack: LayerStack, layer: Layer, step: int) -> bool:
        method, count = stack.method, self._count(stack.method, step, layer)
        due = count >= method.count_from and count % method.refresh_interval == 0
        return (due or method.is_early(count)) and not method.precomputed


def assign_offsets(methods: Mapping[Layer, Preconditioner]) -> dict[Layer, int]:
    """Assigns an offset to each layer, so that no step measures or refreshes many layers.

    The layers of one preconditioner are distributed over the steps of its interval by the cost of
    their refreshes.
    """
    offsets: dict[Layer, int] = {}
    for method in set(methods.values()):
        layers = [layer for layer, chosen in methods.items() if chosen == method]
        costs = [1 + method.refresh_flops(layer) for layer in layers]
        offsets.update(zip(layers, longest_first(costs, method.refresh_interval), strict=True))
    return offsets
