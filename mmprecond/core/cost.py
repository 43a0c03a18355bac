"""Forecast of the FLOPs of preconditioning, from shapes."""

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
        name: Name of the weight.
        method: Name of the preconditioner.
        megabytes: Memory of statistics and operators.
        apply: FLOPs of every step.
        capture: Additional FLOPs of a step that measures the layer.
        refresh: Approximate FLOPs of a refresh.
        calls: Number of calls of the module in a forward pass.
    """

    name: str
    method: str
    megabytes: float
    apply: float
    refresh: float
    capture: float = 0.0
    calls: int = 0

    def add_call(self, flops: float) -> None:
        """Counts a call and the FLOPs of its capture."""
        self.calls += 1
        self.capture += flops


@contextmanager
def measured_costs(
    layers: Mapping[Layer, LayerStack], capture: Capture
) -> Iterator[dict[Layer, LayerCost]]:
    """Yields the costs of each layer; forward passes in the context add the costs of captures.

    Args:
        layers: The layers and their stacks.
        capture: Capture of the layers, suspended in the context.
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
