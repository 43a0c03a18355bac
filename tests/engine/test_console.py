"""Tables in a terminal, and in a file or a pipe."""

from __future__ import annotations

import io
import sys

import pytest

from mmprecond.engine.console import print_table

HEADERS = ['run', 'optimizer', 'mIoU']
ROWS = [['a [red]', 'NKFAC', 9.5], ['longer', 'SGD', 45.25]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(HEADERS, ROWS, left=2)
    assert capsys.readouterr().out.splitlines() == [
        'run      optimizer   mIoU',
        'a [red]  NKFAC        9.5',
        'longer   SGD        45.25',
    ]


def test_rules_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers end in one column, and brackets are text."""
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stdout', terminal)
    monkeypatch.setenv('COLUMNS', '80')
    monkeypatch.setenv('NO_COLOR', '1')
    monkeypatch.setenv('TERM', 'dumb')
    print_table(HEADERS, ROWS, left=2)
    lines = [line.rstrip() for line in terminal.getvalue().splitlines() if line.strip()]
    assert len(lines) == 4 and set(lines[1].strip()) == {'─'}
    assert lines[2].split() == ['a', '[red]', 'NKFAC', '9.5']
    assert len(lines[2]) == len(lines[3]) and lines[2].index('a') == lines[3].index('longer')


def test_a_table_without_rows(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(HEADERS, [])
    assert capsys.readouterr().out == 'run  optimizer  mIoU\n'
