"""Forecast of the floating-point operations of preconditioning, from shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from ..curvature import Call, Capture, Layer
from .memory import megabytes
from .stack import LayerStack


@dataclass
class LayerCost:
    """Costs of one layer.

    Attributes:
        name: The weight's name.
        method: Its preconditioner.
        megabytes: Statistics and operators.
        apply: Operations of every step.
        capture: Operations of a step that measures it, beside `apply`.
        refresh: About the operations of a refresh.
        calls: Times that its module was called in a forward pass.
    """

    name: str
    method: str
    megabytes: float
    apply: float
    refresh: float
    capture: float = 0.0
    calls: int = 0

    def add_call(self, flops: float) -> None:
        """Counts a call whose capture takes so many operations."""
        self.calls += 1
        self.capture += flops


@contextmanager
def measured_costs(
    layers: Mapping[Layer, LayerStack], capture: Capture
) -> Iterator[dict[Layer, LayerCost]]:
    """Each layer's costs; those of captures by the calls of the forward passes made inside.

    Args:
        layers: The layers and their stacks.
        capture: Their capture, which is off meanwhile.
    """
    costs = {
        layer: LayerCost(
            layer.name,
            type(stack.method).__name__,
            megabytes(layer, stack),
            stack.method.apply_flops(layer),
            stack.method.refresh_flops(layer),
        )
        for layer, stack in layers.items()
    }

    def observe(call: Call, kept: tuple[Tensor, ...], output: Tensor) -> None:
        costs[call.layer].add_call(
            sum(
                call.layer.measure_flops(call, kept, output, statistic)
                for statistic in layers[call.layer].kept
            )
        )

    with capture.suspended():
        handles = [handle for layer in costs for handle in layer.watch(observe, lambda *_: None)]
        try:
            yield costs
        finally:
            for handle in handles:
                handle.remove()
