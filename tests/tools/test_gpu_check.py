"""tools/analysis_tools/gpu_check.sh on a CPU, with torch and torchvision alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from analysis_tools import device_checks
from mmprecond.optimizers import NKFAC
from tests.support.paths import ROOT

SCRIPT = 'tools/analysis_tools/gpu_check.sh'


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the script where MMEngine, tabulate and tqdm cannot be imported."""
    absent = 'import sys\nfor name in ("mmengine", "tabulate", "tqdm", "rich"):\n'
    (tmp_path / 'sitecustomize.py').write_text(f'{absent}    sys.modules[name] = None\n')
    return subprocess.run(
        ['bash', SCRIPT, *arguments],
        cwd=ROOT,
        env=dict(os.environ, PYTHON=sys.executable, PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.slow
def test_all_of_it(tmp_path: Path) -> None:
    out = tmp_path / 'out'
    done = run(tmp_path, '--device', 'cpu', '--minutes', '0.01', '--out', str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((out / 'gpu_check.json').read_text())
    outcomes = [check['passed'] for check in result['checks']]
    assert outcomes.count(None) == len(device_checks.METHODS)  # waits, on a GPU only
    assert set(outcomes) == {True, None} and len(result['times']) == 3
    for rows in result['times'].values():
        ours = [row for row in rows if row['name'] in ('NKFAC', 'AFOpt+NKFAC')]
        assert ours and all(
            set(row['seconds']) == {'plain', 'statistics', 'refresh'} and row['state_mb'] > 0
            for row in ours
        )
    assert '| AFOpt+NKFAC |' in (out / 'gpu_check.md').read_text()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--device', 'nowhere'), 'nowhere cannot be used'),
        (('--device', 'cpu', '--minutes', '0'), '--minutes 0 is out of range'),
    ],
)
def test_mistakes_end_in_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2 and message in done.stderr and 'Traceback' not in done.stderr


def test_the_checks_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device('cpu')
    saved = NKFAC.state_dict
    monkeypatch.setattr(NKFAC, 'state_dict', lambda self: {**saved(self), 'precond': None})
    check = device_checks.attempt('resume', 'NKFAC', device_checks.resumed, 'NKFAC', cpu)
    assert check.passed is False and 'largest difference' in check.detail
    monkeypatch.setitem(device_checks.TOLERANCES, torch.float32, 1e-9)
    check = device_checks.attempt('result', 'MAC', device_checks.against_cpu, 'MAC', cpu)
    assert check.passed is False and 'float32' in check.detail
    check = device_checks.attempt('error', 'Nothing', device_checks.resumed, 'Nothing', cpu)
    assert check.passed is False and 'AttributeError' in check.detail
