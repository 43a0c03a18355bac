"""Policy for failed refreshes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..preconditioners import RefreshError
from .stack import LayerStack

logger = logging.getLogger('mmprecond')


class FailurePolicy:
    """Counts failed refreshes; a layer with a failure keeps its last good operator.

    Args:
        tolerated: Number of consecutive failures of one layer that stops training.
    """

    def __init__(self, tolerated: int = 3) -> None:
        self.tolerated = tolerated

    def count(self, stack: LayerStack, positions: Sequence[int], succeeded: Sequence[bool]) -> None:
        """Counts the outcomes of some layers of a stack.

        Raises:
            RefreshError: If a layer reached the number of consecutive failures that stops training.
        """
        for position, outcome in zip(positions, succeeded, strict=True):
            member = stack.members[position]
            name = member.layer.name
            member.count_refresh(outcome)
            if outcome:
                continue
            consequence = (
                'its last good operator stays' if member.refreshes else 'it takes the plain rule'
            )
            logger.warning(
                '%s: refresh failed (%d in a row), %s', name, member.failures, consequence
            )
            if member.failures >= self.tolerated:
                advice = 'raise `damping`, ' if hasattr(stack.method, 'damping') else ''
                raise RefreshError(
                    f'{name}: {member.failures} refreshes in a row failed although its '
                    f'statistics are finite; {advice}lower `lr`, or leave the layer out with '
                    'custom_keys={name: dict(precondition=False)}'
                )
