"""Statistics of a layer's gradient matrix G: G'G and GG', in the forms of other statistics.

They need no hooks. They are taken in the optimizer's step, of the gradients that the rule sees:
after accumulation, sums over ranks, unscaling and clipping. All ranks have the same without
communication.

Source: Shampoo (Gupta et al., 2018, arXiv 1802.09568, Algorithm 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..linalg import rounded
from .calls import Observer
from .drawing import Drawing
from .layer import Layer
from .rows import LayerRows
from .statistic import INPUT, Rows, Side, Statistic


class MatrixLayer(Layer):
    """A parameter whose module cannot be read, for statistics of its gradient matrix alone.

    The first dimension longer than 1 has the rows, all others have the columns, as in a
    convolution. An embedding has no gradient side: its rows are words, of which a batch has few.
    """

    row_kinds: ClassVar[tuple[type[Rows], ...]] = ()
    joins_bias: ClassVar[bool] = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._dims = matrix_dims(self.weight)
        self.rows, self.columns = self._dims[0], math.prod(self._dims[1:])

    @property
    def kernel_positions(self) -> int:
        """Product of all dimensions after rows and channels."""
        return math.prod(self._dims[2:])

    def has_side(self, side: Side) -> bool:
        """True for the input side, and for the gradient side unless the weight is an embedding."""
        return side == INPUT or (super().has_side(side) and not _is_embedding(self.modules[0]))

    def watch(
        self, observe: Observer, complain: Callable[[Layer, str], None]
    ) -> list[RemovableHandle]:
        """Installs no hooks."""
        return []


def matrix_dims(parameter: Tensor) -> list[int]:
    """Dimensions longer than 1 of a parameter; fewer than two of them are no matrix."""
    return [size for size in parameter.shape if size > 1]


def find_matrices(
    model: nn.Module, groups: Iterable[dict[str, Any]], taken: Container[Tensor]
) -> list[tuple[str, MatrixLayer]]:
    """Finds the parameters of a model that are matrices and that no layer has taken.

    Args:
        model: The unwrapped model.
        groups: The optimizer's parameter groups; those with ``precondition=False`` are left alone.
        taken: Parameters of layers.

    Returns:
        Names of the modules that own the parameters, and layers for them.
    """
    allowed = {p for group in groups if group.get('precondition', True) for p in group['params']}
    modules = dict(model.named_modules())
    found = []
    for name, p in model.named_parameters():
        owner = name.rpartition('.')[0]
        floating = p.is_floating_point() and len(matrix_dims(p)) > 1
        if floating and p in allowed and p not in taken and owner in modules:
            found.append((owner, MatrixLayer(name, [modules[owner]], p, None)))
    return found


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


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
    module, gradient = layer.modules[0], rounded(gradient)
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
