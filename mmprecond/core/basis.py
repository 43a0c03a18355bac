"""Rotation of a rule's moments into a new basis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..curvature import Layer
from ..linalg import Operator, Operators, map_tensors
from .stack import LayerStack


@dataclass(frozen=True)
class BasisSnapshot:
    """A stack with its operators and numbers of refreshes before a refresh."""

    stack: LayerStack
    operators: Operators
    refreshes: list[int]


def snapshot(stack: LayerStack) -> BasisSnapshot | None:
    """Returns a snapshot for `rotate`, or None if moments stay as they are."""
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
    """Rotates the moments of refreshed layers from the old basis into the new one, in place.

    Let Q1 = U1old' U1new and Q2 = U2old' U2new. A sum of gradients M becomes ``Q1' M Q2``. The
    second moment V becomes ``(Q1 o Q1)' V (Q2 o Q2)``, its value if entries of the gradient were
    uncorrelated. The sum of V stays. A basis that differs only in order or signs changes nothing
    but the order of the entries of V.

    Args:
        before: Snapshot of the stack before its refresh.
        states: State of the rule by parameter.
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
        for name in quadratic if stack.method.rotates_squares else ():
            if name in param_states[0]:
                _rotate_moment(name, param_states, stack, slot.layer, squared_rotation)


def _basis_change(old: Operators, new: Operators, position: int) -> Operators:
    """Rotations ``U_old' U_new`` by slot."""

    def overlap(old_basis: Operator, new_basis: Operator) -> Operator:
        pairs = zip(old_basis.tensors, new_basis.tensors, strict=True)
        return type(new_basis)(*(a[position : position + 1].mT @ b for a, b in pairs))

    return {slot: overlap(old[slot], operator) for slot, operator in new.items()}


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
