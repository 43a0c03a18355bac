"""The soak at a length that fits CI; docs/guarantees.md has the long one's result."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.paths import TOOLS


@pytest.mark.slow
@pytest.mark.parametrize('optimizer, lr', [('NKFAC', 0.02), ('AdamR', 2e-3)])
def test_faults_kills_and_resumption(optimizer: str, lr: float) -> None:
    soak = TOOLS / 'analysis_tools/soak.py'
    done = subprocess.run(
        [
            sys.executable,
            soak,
            '--optimizer',
            optimizer,
            '--lr',
            str(lr),
            '--steps',
            '100',
            '--kills',
            '2',
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert 'all as it must be' in done.stdout
