"""Tables in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..core.overview import aligned


def print_table(headers: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> None:
    """Prints a table, with rules in a terminal and as plain aligned lines in a file or a pipe.

    Args:
        headers: Titles of the columns.
        rows: Cells of each row.
        left: Number of first columns that hold text, which is aligned to the left. The other
            columns hold numbers, which are aligned to the right.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        print('\n'.join(aligned([headers, *cells], left)))
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, header in enumerate(headers):
        # Text, as rich would read [brackets] in a plain string as a style.
        table.add_column(
            Text(header), justify='left' if number < left else 'right', overflow='fold'
        )
    for row in cells:
        table.add_row(*map(Text, row))
    Console().print(table)
