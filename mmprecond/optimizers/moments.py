"""Moments of a rule that works in a rotated space, when the rotation changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..preconditioners import LayerStack
from ..preconditioners.base import Stacked

if TYPE_CHECKING:
    from .base import PreconditionedOptimizer


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
    """Turns the linear moments of refreshed layers from the old basis into the new one.

    The second moment has no such form: it stays where it is, but restarts when a layer gets its
    first basis.
    """
    for k, slot in enumerate(stack.slots):
        if slot.refreshes == before.refreshes[k]:
            continue
        first = before.refreshes[k] == 0
        old = {} if first else {name: o[k:k + 1] for name, o in before.operator.items()}
        new, parameters = stack.operators([k]), slot.layer.parameters
        states = [optimizer.state[p] for p in parameters]
        for name in optimizer.rule.linear_moments:
            if name not in states[0]:
                continue
            matrix = slot.layer.join(*(state.get(name) for state in states))[None]
            turned = stack.method.apply(new, stack.method.restore(old, matrix))[0]
            for state, piece in zip(states, slot.layer.split(turned), strict=True):
                if name in state:
                    state[name].copy_(piece)
        if first:
            for state in states:
                restart_second_moment(state)


def restart_second_moment(state: dict[str, Any]) -> None:
    """Starts Adam's second moment anew, with a bias correction of its own."""
    if 'exp_avg_sq' in state:
        state['exp_avg_sq'].zero_()
        state['restart'] = state['step']
