"""Trainings that take turns."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from common.training import RunError
from common.turns import take_turns
from tests.support.paths import ROOT

#: A training of a runner that calls the hook alone; it notes its iterations in a file.
TRAINING = """
import os, sys, time
sys.path[:0] = ['{root}', '{root}/tools']
from analysis_tools.suite_entry import TurnHook
name, journal, length = sys.argv[1:4]
options = dict(text.removeprefix('default_hooks.turns.').split('=') for text in sys.argv[4:])
assert options.pop('type') == 'TurnHook'
hook = TurnHook(**{{key: int(value) for key, value in options.items()}})
with open(journal + '.pid', 'w') as file:
    file.write(str(os.getpid()))
hook.before_train(None)
for step in range(int(length)):
    with open(journal, 'a') as file:
        file.write(name)
    time.sleep(0.3 if step == 0 else 0.0)
    hook.after_train_iter(None)
print('the end')
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    pytest.importorskip('mmengine')
    path = tmp_path / 'training.py'
    path.write_text(TRAINING.format(root=ROOT))
    return path


def test_iterations_alternate(script: Path, tmp_path: Path) -> None:
    """Each has its own seconds, without those of the others."""
    journal = tmp_path / 'journal'
    commands = {name: [sys.executable, str(script), name, str(journal), '9'] for name in 'ABC'}
    seconds = take_turns(commands, 5, tmp_path / 'logs')
    assert journal.read_text() == 'ABC' * 5
    assert list(seconds) == ['A', 'B', 'C']
    for times in seconds.values():
        assert len(times) == 5 and times[0] >= 0.3 and min(times[1:]) < 0.3


def test_a_training_that_ends_is_an_error(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(script), 'A', str(tmp_path / 'journal'), '2']
    with pytest.raises(RunError, match='A.log:\n(.*\n)*the end'):
        take_turns({'A': command}, 5, tmp_path)


def test_no_training_is_left_after_an_error(script: Path, tmp_path: Path) -> None:
    """The first waits for its turn when the second fails at its start."""
    journal = tmp_path / 'journal'
    commands = {
        'A': [sys.executable, str(script), 'A', str(journal), '9'],
        'B': [sys.executable, '-c', 'raise SystemExit("no such file")'],
    }
    with pytest.raises(RunError, match='no such file'):
        take_turns(commands, 5, tmp_path)
    assert not journal.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / 'journal.pid').read_text()), 0)
