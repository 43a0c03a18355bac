"""Messages among ranks, from shapes: at a capture, at a refresh, and at every step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature import Layer
from ..distributed import megabytes, owner_buckets, sum_buckets
from .sharding import Sharding
from .stack import LayerStack


@dataclass(frozen=True)
class Messages:
    """Number of messages and their size; a message goes from or to all ranks at once."""

    number: int = 0
    megabytes: float = 0.0

    def __add__(self, other: Messages) -> Messages:
        return Messages(self.number + other.number, self.megabytes + other.megabytes)


@dataclass(frozen=True)
class Traffic:
    """Messages of a capture and of a refresh of all layers, and of every step."""

    capture: Messages
    refresh: Messages
    step: Messages


def traffic(layers: Mapping[Layer, LayerStack], sharding: Sharding) -> Traffic:
    """Forecasts the messages of several ranks, with the likely shapes of operators.

    Args:
        layers: The layers and their stacks; frozen layers send nothing.
        sharding: Division of the work among ranks.
    """
    trained = assign_stacks(layers, sharding)
    # Rows and calls of each layer, and whether any was called (see `SampleCollector`).
    counts = torch.empty(2 * len(layers) + 1, dtype=torch.float64, device='meta')
    statistics = (
        torch.empty(shape, dtype=layer.working_dtype, device='meta')
        for layer, stack in trained.items()
        for statistic in stack.kept
        if not statistic.of_matrix
        for shape in layer.shapes(statistic).values()
    )
    capture = _count([[counts], *sum_buckets(statistics)])
    if sharding.mode == 'none':
        return Traffic(capture, Messages(), Messages())
    return Traffic(capture, _refresh(trained, sharding), _step(trained, sharding))


def assign_stacks(
    layers: Mapping[Layer, LayerStack], sharding: Sharding
) -> dict[Layer, LayerStack]:
    """Stacks of the trained layers, as these ranks would have them."""
    owners = sharding.assign({layer: stack.method for layer, stack in layers.items()})
    stacks: dict[tuple[object, ...], LayerStack] = {}
    assigned = {}
    for layer, held in layers.items():
        if layer.weight.requires_grad:
            stack = LayerStack(held.method, layer, owners[layer])
            assigned[layer] = stacks.setdefault(stack.key, stack)
    return assigned


def _count(messages: Iterable[list[Tensor]]) -> Messages:
    sizes = [megabytes(tensors) for tensors in messages]
    return Messages(len(sizes), sum(sizes))


def _refresh(layers: Mapping[Layer, LayerStack], sharding: Sharding) -> Messages:
    """Outcomes in one sum, layouts in two messages per owner, and the operators."""
    sizes: dict[LayerStack, int] = {}
    for stack in layers.values():
        sizes[stack] = sizes.get(stack, 0) + 1
    outcomes = [torch.empty(1 + len(layers), device='meta')]
    if sharding.mode == 'apply' and not sharding.archive:
        return _count([outcomes])
    owned = [
        (stack.owner or 0, tensor.expand(size, *tensor.shape[1:]))
        for stack, size in sizes.items()
        for operator in stack.outline.values()
        for tensor in operator.tensors
    ]
    if sharding.mode == 'apply':  # to the first rank only
        packed = [[tensor] for owner, tensor in owned if owner]
    else:
        packed = _pack(owned)
    layouts: list[list[Tensor]] = [[]] * (2 * len({stack.owner for stack in sizes}))
    return _count([outcomes, *layouts, *packed])


def _step(layers: Mapping[Layer, LayerStack], sharding: Sharding) -> Messages:
    """Directions of all layers, from the ranks that hold the operators."""
    if sharding.mode != 'apply':
        return Messages()
    stacks = dict.fromkeys(layers.values())
    owned: list[tuple[int, Tensor]] = [
        (stack.owner or 0, p)
        for stack in stacks
        for layer, held in layers.items()
        if held is stack
        for p in layer.parameters
    ]
    return _count(_pack(owned))


def _pack(owned: Sequence[tuple[int, Tensor]]) -> list[list[Tensor]]:
    """Tensors of each message from their owners."""
    owners, tensors = [owner for owner, _ in owned], [tensor for _, tensor in owned]
    return [bucket for _, bucket in owner_buckets(owners, tensors)]
