"""Tables in Markdown, and figures over seeds."""

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
