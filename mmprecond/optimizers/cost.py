"""What preconditioning costs: floating-point operations of its steps, forecast from shapes."""

from __future__ import annotations

from ..curvature import COLUMNS, Layer
from ..preconditioners import Preconditioner
from ..preconditioners.sides import SCALE


def apply_flops(layer: Layer, method: Preconditioner,
                shapes: dict[str, tuple[int, int, int]] | None = None) -> float:
    """Operations of one step's products with a layer's gradient.

    Args:
        layer: The layer.
        method: Its preconditioner.
        shapes: Shapes (b, n, m) of its operators; default: those that are likely.
    """
    shapes = method.operator_shapes(layer) if shapes is None else shapes
    blocks, rows, columns = layer.shape
    total = 0
    for name, (_, _, width) in shapes.items():
        if SCALE not in name:
            products = 2 if COLUMNS in name else 1  # with U, and with U'
            total += 2 * products * blocks * rows * columns * width
    return total * (1 + method.rotates)


def refresh_flops(layer: Layer, method: Preconditioner) -> float:
    """About the operations of one refresh: n^3 for each factor."""
    return sum(b * n * m * m for b, n, m in map(layer.statistic_shape, method.required(layer)))
