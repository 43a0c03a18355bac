"""tools/analysis_tools/figures.py: pictures and CSVs of small runs."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT


def draw(out: Path, *arguments: str) -> list[dict[str, str]]:
    """Runs the tool; returns the rows of its CSV."""
    command = [sys.executable, 'tools/analysis_tools/figures.py', '--out', str(out), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (out / f'{arguments[0]}.png').stat().st_size > 1000
    with (out / f'{arguments[0]}.csv').open() as file:
        return list(csv.DictReader(file))


def test_newtons_iteration_converges_with_both_step_sizes(tmp_path: Path) -> None:
    rows = draw(tmp_path, 'newton', '--size', '60', '--perturbations', '0.05', '--iterations', '25')
    lines = {row['line'] for row in rows}
    assert len(lines) == 2
    for line in lines:
        residuals = [float(row['residual']) for row in rows if row['line'] == line]
        assert len(residuals) == 26 and residuals[-1] < 1e-8 < residuals[0]


def test_inversion_has_all_sizes_and_dampings(tmp_path: Path) -> None:
    rows = draw(tmp_path, 'inversion', '--sizes', '16,32', '--dampings', '0.1,0.001')
    assert [(row['size'], row['damping']) for row in rows if row['line'] == 'cholesky'] == [
        ('16', '0.1'),
        ('32', '0.1'),
        ('32', '0.001'),
    ]
    assert all(float(row['seconds']) > 0 for row in rows)
    exact = [row for row in rows if row['line'] in ('cholesky', 'eigenvectors')]
    assert all(float(row['error']) < 1e-4 for row in exact)


def test_accuracies_of_a_finished_run(tmp_path: Path) -> None:
    log = tmp_path / 'run/20260101/vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    entries = [
        {'loss': 2.0, 'iter': 10, 'time': 0.5, 'accuracy_top-1': 25.0},
        {'accuracy/top1': 30.0, 'step': 10},
        {'loss': 1.0, 'iter': 20, 'time': 0.5, 'accuracy_top-1': 60.0},
        {'accuracy/top1': 50.0, 'step': 20},
    ]
    log.write_text('\n'.join(map(json.dumps, entries)))
    rows = draw(tmp_path, 'accuracy', str(tmp_path / 'run'))
    trained = [row for row in rows if row['training accuracy']]
    assert [(row['iteration'], row['seconds']) for row in trained] == [
        ('10', '5.0'),
        ('20', '10.0'),
    ]
    assert [float(row['validation accuracy']) for row in rows if row['validation accuracy']] == [
        30.0,
        50.0,
    ]


def test_a_folder_without_a_log_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, 'tools/analysis_tools/figures.py', 'accuracy', str(tmp_path)]
    done = subprocess.run(
        [*command[:2], '--out', str(tmp_path / 'out'), *command[2:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and 'has no log of a training' in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_change_and_price_of_short_trainings(tmp_path: Path) -> None:
    pytest.importorskip('mmpretrain')
    rows = draw(tmp_path, 'change', '--steps', '5', '--stat-interval', '2')
    assert len({row['line'] for row in rows}) > 10
    assert all(0 < float(row['change of R']) < 2 for row in rows)
    pytest.importorskip('pytorch_optimizer')
    rows = draw(tmp_path, 'partial', '--intervals', '1,4', '--steps', '2')
    assert {row['line'] for row in rows} == {'SGDPH, round_robin', 'SGDPH, all', 'AdaHessian'}
    assert all(float(row['time']) > 0 and float(row['memory']) >= 1 for row in rows)
