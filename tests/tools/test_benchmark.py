"""tools/analysis_tools/benchmark.py on a small model, and its arithmetic."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from analysis_tools import benchmark, benchmark_entry
from tests.support.paths import ROOT


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, 'tools/analysis_tools/benchmark.py', *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.slow
def test_a_small_classifier(tmp_path: Path) -> None:
    pytest.importorskip('mmpretrain')
    specs = [
        'SGD',
        'AdamW',
        'NKFAC:settings=published:solver=cholesky',
        'NKFAC:settings=published:solver=lowrank:tolerance=0.3',
        'AdamR',
        'AdaAct',
        'SOAA',
        'DCTAdamW',
        'pytorch_optimizer.Muon',
        'AFOpt+AdamR',
    ]
    done = run(
        '--models',
        'configs/quickstart/resnet18_shapes-cls.py',
        '--size',
        '32',
        '32',
        '--batch',
        '4',
        '--cycles',
        '1',
        '--optimizers',
        ','.join(specs),
        '--memory',
        '--intervals',
        '5/25',
        '--out',
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / 'resnet18_shapes-cls.json').read_text())
    found = {r['name']: r for r in record['results']}
    assert list(found) == specs
    for name, r in found.items():
        measured = name[:5] in ('NKFAC', 'AdamR', 'AFOpt')
        assert set(r['iteration']) == (
            {'plain', 'statistics', 'refresh'} if measured else {'plain'}
        )
        assert r['state_mb'] > 0 and r['peak_mb'] > 100
    assert found['AdamR']['base'] == 'AdamW'
    dense = found['NKFAC:settings=published:solver=cholesky']
    assert dense['apply_gflop'] == pytest.approx(dense['forecast_gflop'], rel=0.2)
    assert found['SGD']['overhead']['5/25'] == 1
    plain, measured, refreshed = (dense['iteration'][kind] for kind in benchmark_entry.KINDS)
    average = 0.8 * plain + 0.16 * measured + 0.04 * refreshed
    assert dense['overhead']['5/25'] == pytest.approx(average / found['SGD']['iteration']['plain'])
    assert found['NKFAC:settings=published:solver=lowrank:tolerance=0.3']['ranks']
    table = (tmp_path / 'resnet18_shapes-cls.md').read_text()
    assert all(re.search(rf'\| {re.escape(name)} +\|', table) for name in specs)
    assert (tmp_path / 'resnet18_shapes-cls.png').stat().st_size > 1000


@pytest.mark.slow
def test_what_is_not_there_is_one_line() -> None:
    done = run('--optimizers', 'SDG')
    last = done.stderr.splitlines()[-2]
    assert done.returncode == 2 and "cannot time 'SDG' here; did you mean SGD" in last
    assert 'SGDPH' not in done.stderr
    done = run('--optimizers', 'NKFAC:stat_interval=3')
    assert done.returncode == 2 and 'this tool sets the intervals' in done.stderr
    done = run('--cycles', '0')
    assert done.returncode == 2 and "'0' is not a whole number of at least 1" in done.stderr


def test_the_percentile_counts_kinds_as_often_as_they_come() -> None:
    seconds = dict(plain=[1.0, 1.1], statistics=[2.0], refresh=[9.0])
    assert benchmark.p99(seconds, 20, 50) == 9.0
    assert benchmark.p99(seconds, 50, 1000) == 2.0
    assert benchmark.p99(seconds, 1000, 2000) == 1.1


def test_settings_in_a_name() -> None:
    assert benchmark_entry.parse_spec('NKFAC:solver=lowrank:tolerance=0.3:stagger=true') == (
        'NKFAC',
        dict(solver='lowrank', tolerance=0.3, stagger=True),
    )
