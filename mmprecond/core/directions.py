"""Directions of stacks: functions of tensors in matrix form, and norms of all layers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature import Layer
from ..linalg import Operators
from .stack import LayerStack

#: Least number of entries of matrices that a CPU takes one by one, so that its cache holds them.
LARGE_MATRIX = 2**18
#: Added to norms that are divided by.
TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Transformed:
    """Matrices of some layers before and after a function.

    Attributes:
        layers: k layers of one stack.
        given: The layers' tensors as matrices (k, b, o, i).
        results: The function's results (k, b, o, i).
        parts: Number of equal parts of the b blocks with a norm of their own, or 0 for none.
    """

    layers: tuple[Layer, ...]
    given: Tensor
    results: Tensor
    parts: int

    def rows(self, matrices: Tensor) -> tuple[Tensor, ...]:
        """Views of the parts of matrices (k, b, o, i)."""
        return matrices.unflatten(1, (self.parts, -1)).flatten(0, 1).unbind()

    def scale(self, factors: Tensor) -> None:
        """Scales the results' parts, in place, by factors (k * parts,)."""
        parts = self.results.unflatten(1, (self.parts, -1))
        parts *= factors.view(-1, self.parts, 1, 1, 1)

    def write(self, tensors: dict[Tensor, Tensor]) -> None:
        """Puts the results into a dict by parameter, where it has the parameter."""
        for layer, matrix in zip(self.layers, self.results, strict=True):
            pieces = zip(layer.parameters, layer.split(matrix), strict=True)
            tensors.update((p, piece) for p, piece in pieces if p in tensors)


def transform(
    stack: LayerStack,
    function: Callable[[Operators, Tensor], Tensor],
    tensors: dict[Tensor, Tensor],
) -> list[Transformed]:
    """Applies a function to the matrix form of a stack's tensors.

    Args:
        stack: The stack.
        function: Function of operators and matrices (k, b, o, i).
        tensors: Tensors by parameter.
    """
    ready = [(k, layer) for k, layer in stack.ready() if layer.weight in tensors]
    if not ready:
        return []
    one_by_one = stack.like.device.type == 'cpu' and ready[0][1].weight.numel() >= LARGE_MATRIX
    transformed = []
    for batch in [[one] for one in ready] if one_by_one else [ready]:
        positions, layers = zip(*batch, strict=True)
        matrices = [layer.join(*(tensors.get(p) for p in layer.parameters)) for layer in layers]
        # A single matrix is not copied, so the function must not write to it.
        given = torch.stack(matrices) if len(matrices) > 1 else matrices[0][None]
        results = function(stack.operators_of(positions), given)
        transformed.append(Transformed(layers, given, results, stack.method.norm_parts(layers[0])))
    return transformed


def recover_norms(batches: Iterable[Transformed]) -> None:
    """Scales directions, in place, to the Frobenius norms of their gradients (thesis (3.7)).

    Each part of a layer has one scalar for all its blocks, weight and joint bias together.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[Transformed]] = {}
    for batch in batches:
        if batch.parts and batch.results is not batch.given:
            by_kind.setdefault((batch.given.device, batch.given.dtype), []).append(batch)
    for group in by_kind.values():
        targets = _norms([row for batch in group for row in batch.rows(batch.given)])
        sizes = _norms([row for batch in group for row in batch.rows(batch.results)])
        factors = (targets / sizes.add_(TINY)).split([len(b.given) * b.parts for b in group])
        for batch, own in zip(group, factors, strict=True):
            batch.scale(own)


def _norms(matrices: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(matrices))
