"""When layers are measured and refreshed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..curvature import Layer
from ..distributed import longest_first
from ..preconditioners import Preconditioner
from .stack import LayerStack


class Schedule:
    """Intervals, counted from each method's phase, and each layer's offset within them.

    Args:
        methods: The preconditioner of each layer.
        stagger: Whether layers take turns over the steps of an interval.
    """

    def __init__(self, methods: Mapping[Layer, Preconditioner], stagger: bool) -> None:
        self._offsets = assign_offsets(methods) if stagger else {}
        self._recaptured: set[Layer] = set()

    def captures(self, stack: LayerStack, layer: Layer, step: int) -> bool:
        """True if a layer is measured at a step; one without statistics waits for no refresh."""
        if stack.method.precomputed:
            return False
        method = stack.method
        interval = method.capture_interval if stack.holds(layer) else method.stat_interval
        return layer in self._recaptured or self._count(stack, layer, step) % interval == 0

    def refreshes(self, stack: LayerStack, step: int) -> list[int]:
        """Positions that are refreshed at a step: on schedule, or for the first time.

        A first refresh is tried as soon as there are statistics, if the method says so.
        """
        at_once = stack.method.refresh_on_first_sample
        return [
            k
            for k, slot in enumerate(stack.slots)
            if at_once and slot.waiting or self._is_due(stack, slot.layer, step)
        ]

    def recapture(self, layers: Iterable[Layer]) -> None:
        """Has layers measured at the next step, and no other by an earlier call."""
        self._recaptured = set(layers)

    def _count(self, stack: LayerStack, layer: Layer, step: int) -> int:
        """Count that must be divisible by an interval."""
        return step + stack.method.phase - self._offsets.get(layer, 0)

    def _is_due(self, stack: LayerStack, layer: Layer, step: int) -> bool:
        method, count = stack.method, self._count(stack, layer, step)
        due = count >= method.phase and count % method.refresh_interval == 0
        return due and not method.precomputed


def assign_offsets(methods: Mapping[Layer, Preconditioner]) -> dict[Layer, int]:
    """An offset for each layer, so that no step measures or refreshes many of them.

    Layers of one preconditioner take the steps of its interval in turn, by the cost of a refresh.
    """
    offsets: dict[Layer, int] = {}
    for method in set(methods.values()):
        layers = [layer for layer, chosen in methods.items() if chosen == method]
        costs = [1 + method.refresh_flops(layer) for layer in layers]
        offsets.update(zip(layers, longest_first(costs, method.refresh_interval), strict=True))
    return offsets
