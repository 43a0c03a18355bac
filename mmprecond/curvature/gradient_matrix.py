"""Statistics of a layer's gradient matrix G: G'G and GG', in the forms of other statistics.

They need no hooks. They are taken in the optimizer's step, of the gradients that the rule sees:
after accumulation, sums over ranks, unscaling and clipping. All ranks have the same without
communication.

Source: Shampoo (Gupta et al., 2018, arXiv 1802.09568, Algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .drawing import Drawing
from .layer import Layer
from .rows import LayerRows
from .statistic import Statistic


def measure_matrix(
    layer: Layer, gradient: Tensor, statistics: Sequence[Statistic]
) -> dict[str, Tensor]:
    """Statistics of one gradient matrix.

    Args:
        layer: The layer.
        gradient: G (blocks, o, i), in the layer's `working_dtype`.
        statistics: Statistics over `MATRIX`.

    Returns:
        Tensors by name, from `Form.measure`.
    """
    sums: dict[str, Tensor] = {}
    module = layer.modules[0]
    drawing = Drawing(layer, module, gradient, torch.Generator())  # all rows are taken
    for statistic in statistics:
        rows = LayerRows(layer, module, gradient, gradient, statistic, drawing)
        sums.update(zip(statistic.keys, statistic.form.measure(rows), strict=True))
    return sums


def matrix_flops(layer: Layer, statistic: Statistic) -> float:
    """Approximate FLOPs of `measure_matrix` for one statistic."""
    rows = layer.columns if statistic.side.of_gradient else layer.rows
    return sum(
        statistic.form.measure_flops(rows, *shape) for shape in layer.shapes(statistic).values()
    )
