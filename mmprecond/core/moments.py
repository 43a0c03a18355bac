"""Moments of a rule that works in a rotated space, when the rotation changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..preconditioners.sides import Stacked
from .stack import LayerStack

if TYPE_CHECKING:
    from ..optimizers.base import PreconditionedOptimizer


@dataclass(frozen=True)
class Before:
    """A stack's operators and numbers of refreshes before a refresh."""

    operator: Stacked
    refreshes: list[int]


def remember(stack: LayerStack) -> Before | None:
    """What `carry` will need, or None where moments stay as they are."""
    if not getattr(stack.method, 'rotate_moments', False):
        return None
    return Before({name: o.clone() for name, o in stack.operator.items()},
                  [slot.refreshes for slot in stack.slots])


def carry(optimizer: PreconditionedOptimizer, stack: LayerStack, before: Before) -> None:
    """Turns the moments of refreshed layers from the old basis into the new one.

    With Q1 = U1old' U1new and Q2 = U2old' U2new, sums of gradients become ``Q1' M Q2``, and the
    second moment ``(Q1 o Q1)' V (Q2 o Q2)``: what it would be if entries of the gradient were
    uncorrelated. Its sum stays, and a basis that is the same in another order or with other signs
    changes nothing but places.
    """
    for k, slot in enumerate(stack.slots):
        if slot.refreshes == before.refreshes[k]:
            continue
        new = stack.operators([k])
        turn = {name: o if before.refreshes[k] == 0 else before.operator[name][k:k + 1].mT @ o
                for name, o in new.items()}
        spread = {name: q.square() for name, q in turn.items()}
        states = [optimizer.state[p] for p in slot.layer.parameters]
        for name in (*optimizer.rule.linear_moments, 'exp_avg_sq'):
            if name not in states[0]:
                continue
            matrix = slot.layer.join(*(state.get(name) for state in states))[None]
            turned = stack.method.apply(spread if name == 'exp_avg_sq' else turn, matrix)[0]
            for state, piece in zip(states, slot.layer.split(turned), strict=True):
                if name in state:
                    state[name].copy_(piece)
