"""Commands of README and the documentation: their scripts take the arguments as written."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mmprecond import cli
from mmprecond.resources import find_root
from tests.support.paths import ROOT, TOOLS

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]
#: Starts of a command in an indented block, or alone in a block of bash.
START = re.compile(rf'^(?: {{4}}|)((?:python|bash|mmprecond (?:{"|".join(cli.COMMANDS)})) .*)$')
#: Values of what the reader has to fill in.
BLANKS = {'CONFIG': 'config.py', 'CHECKPOINT': 'epoch_1.pth', '$PWD': '.'}


def commands() -> list[tuple[str, ...]]:
    """Words of each command, without those that another page repeats."""
    found: dict[tuple[str, ...], None] = {}
    for page in PAGES:
        lines = iter(page.read_text().splitlines())
        for line in lines:
            start = START.match(line)
            if start is None:
                continue
            command = start[1]
            while command.endswith('\\'):
                command = command[:-1] + next(lines)
            for blank, value in BLANKS.items():
                command = command.replace(blank, value)
            found[tuple(shlex.split(command, comments=True))] = None
    return list(found)


COMMANDS = commands()


class Parsed(Exception):
    """Ends a script that has accepted its arguments."""


def accept(script: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a script, or a module where it is no file, until its arguments are parsed."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args: object, **kwargs: object) -> None:
        parse(*args, **kwargs)  # type: ignore[call-overload]
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_and_stop)
    monkeypatch.setattr(sys, 'argv', [script, *arguments])
    monkeypatch.setattr(sys, 'path', list(sys.path))
    with pytest.raises(Parsed):
        if script.endswith('.py'):
            sys.path.insert(0, str(Path(script).parent))
            runpy.run_path(script, run_name='__main__')
        else:
            monkeypatch.delitem(sys.modules, script, raising=False)
            runpy.run_module(script, run_name='__main__', alter_sys=True)


#: Scripts of a shell that pass arguments on, and the place of the number of GPUs among these.
LAUNCHERS = {
    'tools/quickstart.sh': ('tools/quickstart.py', 0),
    'tools/dist_train.sh': ('tools/train.py', 1),
    'tools/dist_test.sh': ('tools/test.py', 2),
}


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 50
    assert any('--suite' in words for words in COMMANDS) and any('-m' in w for w in COMMANDS)


@pytest.mark.parametrize('words', COMMANDS, ids=' '.join)
def test_a_script_takes_the_arguments(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip('mmengine')
    monkeypatch.chdir(ROOT)
    program, first, *rest = words
    if program == 'bash':
        assert (ROOT / first).is_file()
        if first not in LAUNCHERS:
            return
        first, skipped = LAUNCHERS[first]
        rest = rest[:skipped] + rest[skipped + 1 :] if skipped else rest
        program = 'python'
    elif program == 'mmprecond':
        script = cli.COMMANDS[first][0]
        root = find_root() / 'tools'
        program, first = 'python', 'mmprecond.diagnostics' if script is None else str(root / script)
    elif first == '-m':
        first, *rest = rest
    accept(first, rest, monkeypatch)


def test_a_wrong_argument_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip('mmengine')
    with pytest.raises(SystemExit):
        accept(str(TOOLS / 'analysis_tools/results.py'), ['--siute=quick'], monkeypatch)
    assert 'unrecognized arguments: --siute' in capsys.readouterr().err
