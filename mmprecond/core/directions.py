"""Directions of layers: preconditioning in matrix form, and rescaling to the gradients' norms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature import Layer
from ..linalg import Operators
from .stack import LayerStack

#: Number of weight entries from which a CPU takes layers one by one, so that its cache holds them.
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
        warm_up: Whether the directions follow a warm-up of the learning rate.
    """

    layers: tuple[Layer, ...]
    given: Tensor
    results: Tensor
    parts: int
    warm_up: bool = False

    def rows(self, matrices: Tensor) -> tuple[Tensor, ...]:
        """Views (b / parts, o, i) of the k * parts parts of matrices (k, b, o, i)."""
        if self.parts > 1:
            matrices = matrices.unflatten(1, (self.parts, -1)).flatten(0, 1)
        return matrices.unbind()

    def cosines(self, norms: Tensor) -> Tensor:
        """Cosines (k * parts,) of the parts of given matrices and results, by products of norms."""
        products = (self.given * self.results).unflatten(1, (self.parts, -1))
        return products.sum((2, 3, 4)).flatten() / (norms + TINY)

    def scale(self, factors: Tensor) -> None:
        """Scales the results' parts, in place, by factors (k * parts,)."""
        parts = self.results.unflatten(1, (self.parts, -1))
        parts *= factors.view(-1, self.parts, 1, 1, 1)

    def write(self, tensors: dict[Tensor, Tensor]) -> None:
        """Puts the results into a dict by parameter, where it has the parameter."""
        for layer, matrix in zip(self.layers, self.results.unbind(), strict=True):
            for p, piece in zip(layer.parameters, layer.split(matrix), strict=True):
                if p in tensors:
                    tensors[p] = piece


def transform(
    stack: LayerStack,
    function: Callable[[Operators, Tensor], Tensor],
    tensors: dict[Tensor, Tensor],
) -> list[Transformed]:
    """Applies a function to the matrix form of a stack's tensors.

    Args:
        stack: The stack.
        function: Function of operators and matrices (k, b, o, i), which it must not change.
        tensors: Tensors by parameter.

    Returns:
        Batches of layers with operators; an empty list if there are none.
    """
    ready = [(k, layer) for k, layer in stack.ready() if layer.weight in tensors]
    if not ready:
        return []
    one_by_one = stack.like.device.type == 'cpu' and ready[0][1].weight.numel() >= LARGE_MATRIX
    transformed = []
    for batch in [[one] for one in ready] if one_by_one else [ready]:
        positions, layers = zip(*batch, strict=True)
        given = _gather(layers, tensors)
        results = function(stack.operators_of(positions), given)
        method = stack.method
        parts = method.norm_parts(layers[0])
        transformed.append(Transformed(layers, given, results, parts, method.warm_up))
    return transformed


def transform_all(stacks: Iterable[LayerStack], tensors: dict[Tensor, Tensor]) -> list[Transformed]:
    """Applies the operators of all stacks to their tensors, as `transform` does."""
    return [batch for stack in stacks for batch in transform(stack, stack.method.apply, tensors)]


def frozen_parts(
    layers: Mapping[Layer, LayerStack], gradients: Mapping[Tensor, Tensor]
) -> dict[Tensor, Tensor]:
    """Zeros for a weight or a joint bias without a gradient, if the other one is rotated.

    A rotation mixes the columns of a matrix, so that the rule needs moments of all of them.
    """
    parts: dict[Tensor, Tensor] = {}
    for layer, stack in layers.items():
        if not stack.method.rotates or layer.bias is None:
            continue
        if layer.weight in gradients and layer.bias not in gradients:
            parts[layer.bias] = torch.zeros_like(layer.bias)
        elif layer.bias in gradients and layer.weight not in gradients and stack.holds(layer):
            parts[layer.weight] = torch.zeros_like(layer.weight)
    return parts


def _gather(layers: Sequence[Layer], tensors: Mapping[Tensor, Tensor]) -> Tensor:
    """Matrices (k, b, o, i) of some layers' tensors; that of a single weight is not copied."""
    weights = [layer.weight_matrix(tensors[layer.weight]) for layer in layers]
    if len({weight.shape for weight in weights}) > 1:  # a bias, or one more input in its place
        rest = [map(tensors.get, layer.parameters[1:]) for layer in layers]
        pairs = zip(layers, rest, strict=True)
        return torch.stack([layer.join(tensors[layer.weight], *bias) for layer, bias in pairs])
    matrices = torch.stack(weights) if len(weights) > 1 else weights[0][None]
    if layers[0].bias is None:
        return matrices
    biases = [layer.bias_column(tensors.get(layer.parameters[1])) for layer in layers]
    columns = torch.stack(biases) if len(biases) > 1 else biases[0][None]
    return torch.cat([matrices, columns], 3)


def recover_norms(batches: Iterable[Transformed], reached: float = 1.0) -> None:
    """Scales directions, in place, to the Frobenius norms of their gradients (thesis (3.7)).

    Each part of a layer has one scalar for all its blocks, weight and joint bias together. During a
    warm-up of the learning rate a direction d is lengthened until ``<d, g> = |g|^2``, where g is
    the gradient. It is at most |g| / reached long. An update is therefore no longer than at the
    full rate. A small step along a direction that meets the equation lowers the loss as much as one
    along the gradient.

    Args:
        batches: Directions of all layers.
        reached: Share of its target that the learning rate has reached; default: 1.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[Transformed]] = {}
    for batch in batches:
        if batch.parts and batch.results is not batch.given:
            by_kind.setdefault((batch.given.device, batch.given.dtype), []).append(batch)
    for group in by_kind.values():
        targets = _norms([row for batch in group for row in batch.rows(batch.given)])
        sizes = _norms([row for batch in group for row in batch.rows(batch.results)])
        counts = [len(batch.given) * batch.parts for batch in group]
        factors, norms = (t.split(counts) for t in (targets / (sizes + TINY), targets * sizes))
        for batch, factor, norm in zip(group, factors, norms, strict=True):
            if reached < 1 and batch.warm_up:
                factor = factor / batch.cosines(norm).clamp(reached, 1)
            batch.scale(factor)


def _norms(matrices: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(matrices))
