"""Contract of a rule, which turns directions (gradients, preconditioned or not) into updates.

A rule first computes updates from directions and its moments. It then applies the updates to the
parameters. In between, a preconditioner may transform the updates. Both steps work on lists of
tensors with equal hyper-parameters.
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
    """First-order rule.

    Attributes:
        hyper: Names of the group entries that the rule reads.
        defaults: Default values of these entries; lr has none.
        linear_moments: Names of the moments that are sums of directions.
        quadratic_moments: Names of the moments that are sums of squared directions.
        elementwise: Whether an update scales each entry by the history of that entry alone. Such a
            rule depends on the basis; rotations need one.
        exact: Names of state tensors with a dtype of their own, which loading must not change.
        scales_by_rate: Whether a step is the update times the learning rate.
    """

    hyper: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[dict[str, Any]] = {}
    linear_moments: ClassVar[tuple[str, ...]] = ()
    quadratic_moments: ClassVar[tuple[str, ...]] = ()
    elementwise: ClassVar[bool] = False
    exact: ClassVar[tuple[str, ...]] = ()
    scales_by_rate: ClassVar[bool] = True

    def key(self, group: Group, state: State) -> Hashable:
        """Key of a parameter; parameters with equal keys are updated together."""
        return (*(group[name] for name in self.hyper), state.get('step'))

    @classmethod
    def check(cls, group: Group) -> None:
        """Raises ValueError if a hyper-parameter of a group is out of range."""
        for name in ('lr', 'weight_decay'):
            check_number(name, group[name])

    def complete(self, group: Group, defaults: Group) -> Group:
        """A new group with the entries that follow from others, before the defaults fill it."""
        return group

    @abstractmethod
    def compute_updates(
        self, params: list[Tensor], directions: list[Tensor], states: list[State], group: Group
    ) -> list[Tensor]:
        """Computes updates in the shapes of the parameters; they may alias moments."""

    def combine(self, updates: dict[Tensor, Tensor]) -> None:  # noqa: B027
        """Changes the updates of all parameters jointly, in the dict, once all are computed."""

    @abstractmethod
    def apply_updates(
        self, params: list[Tensor], updates: list[Tensor], states: list[State], group: Group
    ) -> None:
        """Moves the parameters along the negative updates, in place."""

    def check_state(self, param: Tensor, state: State, group: Group) -> None:
        """Raises ValueError if the saved state of a parameter, never empty, does not fit."""
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != param.shape:
                raise ValueError(
                    f'the saved {name} of a parameter of shape {tuple(param.shape)} has shape '
                    f'{tuple(value.shape)}: it was saved for another model or under another rule; '
                    'start afresh from the weights alone (load_from without resume)'
                )

    def notes(self, groups: list[Group], names: Mapping[Tensor, str]) -> list[str]:
        """Lines for the log about parameters that the rule treats differently."""
        return []


def moments_of(states: list[State], name: str, params: list[Tensor]) -> list[Tensor]:
    """Returns one moment of each parameter; missing ones are created as zeros."""
    for state, param in zip(states, params, strict=True):
        if name not in state:
            state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return [state[name] for state in states]


def move_decoupled(params: list[Tensor], updates: list[Tensor], group: Group) -> None:
    """Moves parameters by decoupled weight decay and then along the negative updates."""
    decay = group['lr'] * group['weight_decay']
    if decay:
        torch._foreach_mul_(params, 1 - decay)
    torch._foreach_add_(params, updates, alpha=-group['lr'])
