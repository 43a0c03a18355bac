"""Progress of the learning rate's warm-up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

#: Lower limit of `WarmUp.reached`.
LEAST_REACHED = 0.01
#: Part of its largest value to which a rate must fall to have passed its target. A decay by epochs
#: that begins within the warm-up makes smaller dips.
FALLEN = 0.9


class WarmUp:
    """Progress of the warm-up, from step to step.

    Attributes:
        share: Largest share of its target that the learning rate has had so far, 0 to 1.
    """

    def __init__(self) -> None:
        self.share = 0.0

    @property
    def reached(self) -> float:
        """The share that damping and norms are computed with: not below `LEAST_REACHED`."""
        return max(LEAST_REACHED, self.share)

    def restore(self, share: float) -> None:
        """Takes the share that a saved run had reached."""
        self.share = share

    def update(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Takes the rates of a step."""
        if self.share < 1:
            self.share = share_reached(groups, self.share)


def share_reached(groups: Iterable[Mapping[str, Any]], before: float = 0.0) -> float:
    """Largest share of its target that the learning rate has reached, 0 to 1.

    The target of a group is `initial_lr`, or the `max_lr` of OneCycleLR; schedulers write them into
    groups. A group without them counts as 1, and one with a target of 0 does not count. A rate that
    has clearly fallen has passed its target, which counts as 1 too: schedules such as Noam's stay
    far below `initial_lr`.

    Args:
        groups: The optimizer's parameter groups.
        before: The share of the step before.
    """
    shares = [share for group in groups if (share := _share(group)) is not None]
    share = max(shares, default=1.0)
    if 0 < share < FALLEN * before:
        return 1.0
    return min(1.0, max(share, before))


def _share(group: Mapping[str, Any]) -> float | None:
    """Share of its target that the rate of a group has; None for a target of 0."""
    targets = [float(group[key]) for key in ('initial_lr', 'max_lr') if group.get(key) is not None]
    if not targets:
        return 1.0
    return float(group['lr']) / max(targets) if max(targets) else None
