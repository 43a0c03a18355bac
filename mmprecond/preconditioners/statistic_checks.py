"""Checks of the statistics that a preconditioner asks for."""

from __future__ import annotations

from typing import Any

from ..curvature import Statistic


def check_statistics(owner: str, statistics: Any) -> None:
    """Raises TypeError or ValueError for statistics that one preconditioner cannot keep.

    Args:
        owner: The preconditioner's name.
        statistics: Tuple of statistics of different sides, over the same rows.
    """
    if not isinstance(statistics, (tuple, list)):
        raise TypeError(
            f'{owner}: statistics={statistics!r} is no tuple; write (Statistic(INPUT, Moment()),)'
        )
    wrong = [item for item in statistics if not isinstance(item, Statistic)]
    if wrong:
        raise TypeError(
            f'{owner} asks for {wrong[0]!r}, which is no Statistic; write '
            'Statistic(INPUT, Moment()) or similar'
        )
    sides = [item.side for item in statistics]
    if len(set(sides)) < len(sides) or len({item.key for item in statistics}) < len(sides):
        raise ValueError(
            f'{owner} asks for two statistics of one side or name: '
            f'{", ".join(item.key for item in statistics)}'
        )
    if len({item.rows for item in statistics if item.form.is_product}) > 1:
        raise ValueError(
            f'{owner} asks for statistics over different rows: '
            f'{", ".join(item.key for item in statistics)}'
        )
