"""Forecast of the FLOPs of preconditioning, from shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from ..curvature import Call, Capture, Layer, matrix_flops
from ..preconditioners import Preconditioner
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

    def per_step(self, method: Preconditioner) -> float:
        """FLOPs of a step, with captures and refreshes averaged over the method's intervals."""
        return (
            self.apply
            + self.capture / method.capture_interval
            + self.refresh / method.refresh_interval
        )


def cost_of(layer: Layer, stack: LayerStack) -> LayerCost:
    """Costs of a layer that are known before a forward pass: all but those of captures."""
    method = stack.method
    return LayerCost(
        layer.name,
        type(method).__name__,
        megabytes(layer, stack),
        method.apply_flops(layer),
        method.refresh_flops(layer),
        sum(matrix_flops(layer, statistic) for statistic in stack.kept if statistic.of_matrix),
    )


@contextmanager
def measured_costs(
    layers: Mapping[Layer, LayerStack], capture: Capture
) -> Iterator[dict[Layer, LayerCost]]:
    """Yields the costs of each layer; forward passes in the context add the costs of captures.

    Args:
        layers: The layers and their stacks.
        capture: Capture of the layers, suspended in the context.
    """
    costs = {layer: cost_of(layer, stack) for layer, stack in layers.items()}

    def observe(call: Call, kept: tuple[Tensor, ...], output: Tensor) -> None:
        costs[call.layer].add_call(
            sum(
                call.layer.measure_flops(call, kept, output, statistic)
                for statistic in layers[call.layer].kept
                if not statistic.of_matrix
            )
        )

    with capture.suspended():
        handles = [handle for layer in costs for handle in layer.watch(observe, lambda *_: None)]
        try:
            yield costs
        finally:
            for handle in handles:
                handle.remove()
