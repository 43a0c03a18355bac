"""Rules: how a direction, that is a gradient or a preconditioned one, becomes an update.

A rule first computes updates from directions, keeping its moments, then moves the parameters. In
between a rotation may turn the updates back. Both work on lists of tensors that share their
hyper-parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_number

State = dict[str, Any]

Group = dict[str, Any]


class Rule(ABC):
    """A first-order rule.

    Attributes:
        hyper: Names of the group entries that the rule reads.
        defaults: Their values where the user gives none; there is none for lr.
        linear_moments: Names of the moments that are sums of directions.
        quadratic_moments: Names of the moments that are sums of squared directions.
        elementwise: Whether an update scales each entry by that entry's own history, so that the
            rule differs in another basis; a rotation needs such a rule.
        exact: Names of what is kept in a dtype of its own, which loading must not change.
    """

    hyper: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[dict[str, Any]] = {}
    linear_moments: ClassVar[tuple[str, ...]] = ()
    quadratic_moments: ClassVar[tuple[str, ...]] = ()
    elementwise: ClassVar[bool] = False
    exact: ClassVar[tuple[str, ...]] = ()

    def key(self, group: Group, state: State) -> Hashable:
        """Parameters with equal keys are updated together."""
        return (*(group[name] for name in self.hyper), state.get('step'))

    @classmethod
    def check(cls, group: Group) -> None:
        """Raises ValueError for a group's bad hyper-parameters."""
        for name in ('lr', 'weight_decay'):
            check_number(name, group[name])

    def complete(self, group: Group, defaults: Group) -> Group:
        """A new group with the entries that follow from others, before the defaults fill it."""
        return group

    @abstractmethod
    def compute_updates(
        self, params: list[Tensor], directions: list[Tensor], states: list[State], group: Group
    ) -> list[Tensor]:
        """Updates, shaped like the parameters; may alias the states' moments."""

    def combine(self, updates: dict[Tensor, Tensor]) -> None:  # noqa: B027
        """Changes all parameters' updates together, in the dict, once all are computed."""

    @abstractmethod
    def apply_updates(
        self, params: list[Tensor], updates: list[Tensor], states: list[State], group: Group
    ) -> None:
        """Moves the parameters along the negative updates, in place."""

    def check_state(self, param: Tensor, state: State, group: Group) -> None:  # noqa: B027
        """Raises ValueError for a parameter's saved state that does not fit."""

    def notes(self, groups: list[Group], names: Mapping[Tensor, str]) -> list[str]:
        """Lines for the log about parameters that the rule treats otherwise."""
        return []


def moments_of(states: list[State], name: str, params: list[Tensor]) -> list[Tensor]:
    """A moment of each parameter, made where it is missing."""
    for state, param in zip(states, params, strict=True):
        if name not in state:
            state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return [state[name] for state in states]
