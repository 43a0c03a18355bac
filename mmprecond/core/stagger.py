"""Captures and refreshes spread over the steps of an interval."""

from __future__ import annotations

from ..curvature import Layer
from ..distributed import longest_first
from ..preconditioners import Preconditioner


def take_turns(methods: dict[Layer, Preconditioner]) -> None:
    """Gives each layer an offset, so that no step measures or refreshes many of them.

    Layers of one preconditioner take the steps of its interval in turn, by the cost of a refresh.
    """
    for method in set(methods.values()):
        layers = [layer for layer, chosen in methods.items() if chosen == method]
        costs = [1 + method.refresh_flops(layer) for layer in layers]
        for layer, offset in zip(layers, longest_first(costs, method.refresh_interval),
                                 strict=True):
            layer.offset = offset
