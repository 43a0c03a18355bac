"""tools/analysis_tools/scaling.py on small sizes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from analysis_tools import scaling
from tests.support.paths import ROOT


def test_table_and_figure(tmp_path: Path) -> None:
    arguments = ['--widths', '8,16,32', '--kernels', '1,3', '--rows', '256,512', '--turns', '1']
    arguments += ['--forms', 'dense', 'separable', '--out', str(tmp_path)]
    done = subprocess.run(
        [sys.executable, 'tools/analysis_tools/scaling.py', *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / 'scaling.json').read_text())
    sizes = {axis: values for axis, (values, _) in found.items()}
    assert sizes == {'width': [8, 16, 32], 'kernel': [1, 3], 'rows': [256, 512]}
    for _, forms in found.values():
        assert set(forms) == {'dense', 'separable'}
        assert all(
            seconds > 0 for times in forms.values() for one in times for seconds in one.values()
        )
    assert re.search(r'\| refresh +\| separable +\|', (tmp_path / 'scaling.md').read_text())
    assert (tmp_path / 'scaling.png').stat().st_size > 1000


def test_rows_must_fill_images(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['scaling.py', '--rows', '100'])
        scaling.parse_args()
    assert 'takes multiples of' in capsys.readouterr().err


def test_slopes_are_exponents_of_the_larger_half() -> None:
    sizes = [1, 2, 4, 8]
    assert scaling.slope(sizes, [9.0, 9.0, 4.0**3, 8.0**3]) == pytest.approx(3)
