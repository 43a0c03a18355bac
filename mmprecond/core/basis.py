"""Rotation of a rule's moments into a new basis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..curvature import Layer
from ..linalg import Operator, Operators, map_tensors, stacked_product, take
from ..preconditioners import Preconditioner
from .stack import LayerStack


@dataclass(frozen=True)
class BasisSnapshot:
    """A stack with its operators and numbers of refreshes before a refresh."""

    stack: LayerStack
    operators: Operators
    refreshes: list[int]

    def operators_of(self, positions: Sequence[int]) -> Operators:
        """Operators of the layers at some positions."""
        return map_tensors(self.operators, lambda stacked: take(stacked, positions))


def snapshot(stack: LayerStack) -> BasisSnapshot | None:
    """Returns a snapshot for `rotate`, or None if moments stay as they are."""
    if not stack.method.moves_moments:
        return None
    refreshes = [member.refreshes for member in stack.members]
    return BasisSnapshot(stack, map_tensors(stack.operators, torch.clone), refreshes)


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
    but the order of the entries of V. Methods may leave V as it is (`moves_squares`).

    Args:
        before: Snapshot of the stack before its refresh.
        states: State of the rule by parameter.
        linear: Names of moments that are sums of gradients.
        quadratic: Names of moments that are sums of squared gradients.
    """
    stack = before.stack
    changed: dict[tuple[bool, frozenset[str]], list[int]] = {}
    for k, member in enumerate(stack.members):
        past = before.refreshes[k]
        names = {*linear, *quadratic} if stack.method.moves_squares(past) else {*linear}
        # Not by index: the rule's mapping would get an empty state.
        held = frozenset(states.get(member.layer.weight, ())) & names
        if member.refreshes != past and held:
            changed.setdefault((past == 0, held), []).append(k)
    for (is_first, held), positions in changed.items():
        for chunk in stack.chunks(positions):
            old = {} if is_first else before.operators_of(chunk)  # first: the identity
            change = _Change(stack.method, old, stack.operators_of(chunk))
            layers = [stack.members[k].layer for k in chunk]
            for name in held.intersection(linear):
                _replace_moments(name, states, layers, change.rotate_gradients)
            for name in held.intersection(quadratic):
                _replace_moments(name, states, layers, change.rotate_squares)


@dataclass(frozen=True)
class _Change:
    """Change of some layers' bases; no old basis is the identity."""

    method: Preconditioner
    old: Operators
    new: Operators

    def rotate_gradients(self, matrices: Tensor) -> Tensor:
        """``Q1' M Q2`` for sums of gradients M (k, b, o, i)."""
        return self.method.apply(self.new, self.method.restore(self.old, matrices))

    def rotate_squares(self, matrices: Tensor) -> Tensor:
        """``(Q1 o Q1)' V (Q2 o Q2)`` for sums of squared gradients V (k, b, o, i)."""
        changes = {slot: _overlap(self.old.get(slot), basis) for slot, basis in self.new.items()}
        return self.method.apply(map_tensors(changes, torch.square), matrices)


def _overlap(old: Operator | None, new: Operator) -> Operator:
    """Rotations ``U_old' U_new`` of one side; no old basis is the identity."""
    if old is None:
        return new
    pairs = zip(old.tensors, new.tensors, strict=True)
    return type(new)(*(stacked_product(a.mT, b) for a, b in pairs))


def _replace_moments(
    name: str,
    states: Mapping[Tensor, dict[str, Any]],
    layers: Sequence[Layer],
    change: Callable[[Tensor], Tensor],
) -> None:
    """Replaces one moment of some layers, in place, by a function of matrices (k, b, o, i)."""
    moments: list[list[Any]] = [
        [states.get(p, {}).get(name) for p in layer.parameters] for layer in layers
    ]
    matrices = [layer.join(*m) for layer, m in zip(layers, moments, strict=True)]
    changed = change(torch.stack(matrices))
    for layer, parts, matrix in zip(layers, moments, changed, strict=True):
        for moment, piece in zip(parts, layer.split(matrix), strict=True):
            if moment is not None:
                moment.copy_(piece)
