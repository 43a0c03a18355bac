"""What preconditioning costs: floating-point operations of its steps, forecast from shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..curvature import Layer
from ..curvature.layer import Call
from .memory import megabytes

if TYPE_CHECKING:
    from ..optimizers.base import PreconditionedOptimizer


@dataclass
class LayerCost:
    """What one layer costs.

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
    capture: float = 0.
    calls: int = 0


@contextmanager
def measured_costs(optimizer: PreconditionedOptimizer) -> Iterator[dict[Layer, LayerCost]]:
    """Each layer's costs; those of captures by the calls of the forward passes made inside."""
    costs = {layer: LayerCost(layer.name, type(stack.method).__name__, megabytes(layer, stack),
                              stack.method.apply_flops(layer), stack.method.refresh_flops(layer))
             for layer, stack in optimizer.layers.items()}

    def observe(call: Call, kept: tuple[Tensor, ...], output: Tensor) -> None:
        cost = costs[call.layer]
        cost.calls += 1
        cost.capture += sum(call.layer.measure_flops(call, kept, output, name)
                            for name in optimizer.layers[call.layer].requires)

    optimizer.disarm()
    handles = [handle for layer in costs for handle in layer.watch(observe, lambda *_: None)]
    try:
        yield costs
    finally:
        for handle in handles:
            handle.remove()
        optimizer._arm_if_automatic()
