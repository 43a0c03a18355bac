"""Moments of a rule that works in a rotated space, when the rotation changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..curvature import Layer
from ..linalg import Dense, Operators, map_tensors
from .stack import LayerStack


@dataclass(frozen=True)
class BasisSnapshot:
    """A stack with its operators and numbers of refreshes before a refresh."""

    stack: LayerStack
    operators: Operators
    refreshes: list[int]


def snapshot(stack: LayerStack) -> BasisSnapshot | None:
    """Snapshot for `rotate`, or None where moments stay as they are."""
    if not stack.method.moves_moments:
        return None
    return BasisSnapshot(
        stack, map_tensors(stack.operators, torch.clone), [slot.refreshes for slot in stack.slots]
    )


def rotate(
    before: BasisSnapshot,
    states: Mapping[Tensor, dict[str, Any]],
    linear: Sequence[str],
    quadratic: Sequence[str],
) -> None:
    """Turns the moments of refreshed layers from the old basis into the new one, in place.

    With Q1 = U1old' U1new and Q2 = U2old' U2new, sums of gradients become ``Q1' M Q2``, and the
    second moment ``(Q1 o Q1)' V (Q2 o Q2)``: what it would be if entries of the gradient were
    uncorrelated. Its sum stays, and a basis that is the same in another order or with other signs
    changes nothing but places.

    Args:
        before: The stack before its refresh.
        states: The rule's state by parameter.
        linear: Names of moments that are sums of gradients.
        quadratic: Names of moments that are sums of squared gradients.
    """
    stack = before.stack
    for k, slot in enumerate(stack.slots):
        if slot.refreshes == before.refreshes[k]:
            continue
        new = stack.operators_of([k])
        rotation = new if before.refreshes[k] == 0 else _basis_change(before.operators, new, k)
        param_states = [states[p] for p in slot.layer.parameters]
        for name in linear:
            if name in param_states[0]:
                _rotate_moment(name, param_states, stack, slot.layer, rotation)
        squared_rotation = map_tensors(rotation, torch.square)
        for name in quadratic:
            if name in param_states[0]:
                _rotate_moment(name, param_states, stack, slot.layer, squared_rotation)


def _basis_change(old: Operators, new: Operators, position: int) -> Operators:
    """``U_old' U_new`` by slot."""

    def overlap(slot: str, new_basis: Tensor) -> Dense:
        (old_basis,) = old[slot].tensors
        return Dense(old_basis[position : position + 1].mT @ new_basis)

    return {slot: overlap(slot, *operator.tensors) for slot, operator in new.items()}


def _rotate_moment(
    name: str,
    states: Sequence[dict[str, Any]],
    stack: LayerStack,
    layer: Layer,
    operators: Operators,
) -> None:
    tensors: list[Any] = [state.get(name) for state in states]
    matrix = layer.join(*tensors)[None]
    rotated = stack.method.apply(operators, matrix)[0]
    for state, piece in zip(states, layer.split(rotated), strict=True):
        if name in state:
            state[name].copy_(piece)
