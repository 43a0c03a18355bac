"""Damping of each layer, as the optimizer's parameter groups have it now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..checks import check_number
from ..curvature import Layer
from ..preconditioners import Preconditioner
from .gradient_damping import GradientDamping

#: Entry of a parameter group, and its value before a scheduler changed it. MMEngine's schedulers
#: use the same names.
KEY, INITIAL = 'damping', 'initial_damping'


class Dampings:
    """Dampings of the layers at the start, which the groups then change.

    A group has the damping of its layers as ``group['damping']``. A scheduler or a loop may change
    it; the next refresh takes it. Where the layers of a group have different dampings, the group
    has the first one's, and the others keep their ratios to it.

    Args:
        groups: The optimizer's parameter groups, of which some have a damping of their own.
        methods: Preconditioner of each layer.

    Attributes:
        gradient: Control of the dampings by the gradient's norm, of layers with
            ``damping_form='gradient'``; None if there are none.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], methods: Mapping[Layer, Preconditioner]
    ) -> None:
        self._following = {
            layer
            for layer, method in methods.items()
            if getattr(method, 'damping_form', None) == 'gradient'
        }
        windows = [methods[layer].refresh_interval for layer in self._following]
        self.gradient = GradientDamping(min(windows)) if windows else None
        self._given: dict[Layer, float] = {}
        self._start: dict[Layer, float] = {}
        self._methods = {
            layer: method for layer, method in methods.items() if hasattr(method, 'damping')
        }
        _refuse_without_effect(groups, methods)
        owned = _group_of_each(groups)
        for layer, method in self._methods.items():
            given = owned.get(layer.weight, {}).get(KEY)
            if given is not None:
                replace(method, **{KEY: given})  # the method's own checks
                self._given[layer] = given
            self._start[layer] = method.damping if given is None else given

    @property
    def default(self) -> dict[str, float]:
        """Entry of a group without layers, which a scheduler also looks for; the first layer's."""
        return {KEY: next(iter(self._start.values()))} if self._start else {}

    def complete(self, groups: Sequence[dict[str, Any]]) -> None:
        """Writes the dampings into groups that have none, if any layer has one."""
        by_weight = {layer.weight: damping for layer, damping in self._start.items()}
        for group in groups if self._start else ():
            own = next((by_weight[p] for p in group['params'] if p in by_weight), self.default[KEY])
            if group.get(KEY) is None:
                group[KEY] = own
            group.setdefault(INITIAL, group[KEY])

    def restore(self, groups: Sequence[dict[str, Any]], own: Sequence[Mapping[str, Any]]) -> None:
        """Gives groups of a loaded state this optimizer's damping, unless it had been changed.

        Args:
            groups: The groups, with the values of the state.
            own: Entries of the groups before.
        """
        for group, before in zip(groups, own, strict=True):
            changed = INITIAL in group and group[KEY] != group[INITIAL]
            if KEY in before and not changed:
                group[KEY] = before[KEY]
                group[INITIAL] = before.get(INITIAL, before[KEY])  # a group that was added has none
        self.complete(groups)

    def advance(self) -> None:
        """Adapts dampings that follow the gradient, before a refresh."""
        if self.gradient:
            self.gradient.update_factor()

    def current(self, groups: Iterable[Mapping[str, Any]]) -> dict[Layer, float]:
        """Dampings of now, of layers whose damping is not their method's."""
        owned = _group_of_each(groups)
        found = {}
        factor = self.gradient.factor if self.gradient else 1.0
        for layer, start in self._start.items():
            group = owned.get(layer.weight, {})
            now, initial = group.get(KEY, start), group.get(INITIAL, start)
            if now != initial:
                check_number(f'damping of the group of {layer.name}', now, open_low=True)
                found[layer] = start * (now / initial)
                replace(self._methods[layer], **{KEY: found[layer]})  # the method's own checks
            elif layer in self._given:
                found[layer] = start
            if layer in self._following:
                found[layer] = factor * found.get(layer, start)
        return found

    def state_dict(self) -> dict[str, Any]:
        """State of the control by the gradient, if there is one."""
        return self.gradient.state_dict() if self.gradient else {}

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        """Loads what `state_dict` returned."""
        if self.gradient:
            self.gradient.load_state_dict(saved or {})


def _refuse_without_effect(
    groups: Iterable[Mapping[str, Any]], methods: Mapping[Layer, Preconditioner]
) -> None:
    """Raises ValueError for a damping in a group whose methods all have none."""
    by_weight = {layer.weight: method for layer, method in methods.items()}
    for group in groups:
        found = [by_weight[p] for p in group['params'] if p in by_weight]
        if group.get(KEY) is not None and found and not any(hasattr(m, KEY) for m in found):
            raise ValueError(
                f'a parameter group has damping, which {found[0].title} does not take: leave it out'
            )


def _group_of_each(groups: Iterable[Mapping[str, Any]]) -> dict[Any, Mapping[str, Any]]:
    return {p: group for group in groups for p in group['params']}
