"""Tables in Markdown, durations, and figures over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any


def markdown(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a Markdown table of the cells, without escapes."""
    from tabulate import tabulate  # help texts must come without an environment

    return str(tabulate(list(rows), headers, tablefmt='github', disable_numparse=True))


def spread(values: list[float], form: str) -> str:
    """Returns the mean, with the range if there are several values."""
    text = f'{mean(values):{form}}'
    if len(values) > 1:
        text += f' ({min(values):{form}}-{max(values):{form}})'
    return text.replace('nan', 'diverged')


def duration(seconds: float) -> str:
    """Returns a duration as `4.2 s`, `42 s`, `12 min` or `3.4 h`, and '-' for none."""
    if not seconds:
        return '-'
    for unit, size in (('s', 1), ('min', 60)):
        value = seconds / size
        if value < 59.5:
            return f'{value:.{1 if value < 9.95 else 0}f} {unit}'
    return f'{seconds / 3600:.1f} h'
