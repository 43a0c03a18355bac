"""Entries of parameter groups beside a rule's hyper-parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..checks import did_you_mean

#: Entries of a parameter group that choose how its weights are preconditioned.
GROUP_KEYS = ('precondition', 'damping', 'initial_damping', 'input_positions')
#: Settings of torch's optimizers that no rule has, at the values that change nothing.
FOREIGN_SETTINGS = {'maximize': False, 'dampening': 0, 'amsgrad': False}


def refuse_without_effect(
    entries: Mapping[str, Any],
    owner: str,
    read: Sequence[str],
    common: Mapping[str, str],
) -> None:
    """Raises ValueError for an entry that is meant for us and would be ignored.

    Args:
        entries: Entries of a group that are no hyper-parameters.
        owner: The optimizer's name.
        read: Those of `GROUP_KEYS` that the optimizer reads.
        common: Settings that all groups have in common, with the place where to give them.
    """
    for key in sorted(entries.keys() - set(read)):
        foreign = key in FOREIGN_SETTINGS and entries[key] != FOREIGN_SETTINGS[key]
        if key in GROUP_KEYS or foreign:
            raise ValueError(
                f'a parameter group has {key}={entries[key]}, which {owner} does not read: leave '
                'it out'
            )
        if key in common:
            raise ValueError(
                f'a parameter group has {key}, which all groups have in common: {common[key]}'
            )
        if near := did_you_mean(key, read, 0.9):
            raise ValueError(f'a parameter group has {key}; {near.rstrip()}')
