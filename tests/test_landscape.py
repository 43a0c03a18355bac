"""The command on a small classifier: spectra, surface, and errors."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from mmprecond import datasets
from tests.support.commands import run_python
from tests.support.paths import ROOT

CONFIG = ROOT / 'configs/quickstart/resnet18_shapes-cls.py'


@pytest.mark.slow
def test_the_command_on_a_checkpoint_of_nkfac(tmp_path: Path) -> None:
    pytest.importorskip('mmpretrain')
    datasets.make_shape_folders(tmp_path / 'data', images=16, split='train', progress=False)
    datasets.make_shape_folders(tmp_path / 'data', images=8, split='val', progress=False)
    options = (
        '--cfg-options',
        f'train_dataloader.dataset.data_root={tmp_path}/data/',
        f'val_dataloader.dataset.data_root={tmp_path}/data/',
        'train_cfg.max_iters=2',
        'train_cfg.val_interval=2',
        'default_hooks.checkpoint.interval=2',
        'train_dataloader.batch_size=8',
    )
    work = tmp_path / 'work'
    trained = run_python(
        'tools/train.py', CONFIG, '--optimizer', 'NKFAC', '--work-dir', work, *options
    )
    assert trained.returncode == 0, trained.stderr[-1500:]
    (config,) = work.glob('*/vis_data/config.py')
    out = tmp_path / 'out'
    done = run_python(
        '-m',
        'mmprecond.landscape',
        config,
        work / 'iter_2.pth',
        '--out',
        out,
        '--steps',
        4,
        '--runs',
        1,
        '--points',
        3,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    for_gauss_newton = ('--matrix', 'gauss-newton', '--steps', 3, '--runs', 1, '--plane', 'none')
    again = run_python(
        '-m',
        'mmprecond.landscape',
        config,
        work / 'iter_2.pth',
        '--out',
        out / 'g',
        *for_gauss_newton,
    )
    assert again.returncode == 0, again.stderr[-1500:]
    with (out / 'g/spectrum.csv').open() as file:
        rows = [row for row in csv.DictReader(file) if row['spectrum'] == 'Gauss-Newton matrix']
    assert len(rows) == 3 and all(float(row['value']) > -1e-3 for row in rows)
    plain = ('--out', out / 'p', '--steps', 2, '--runs', 1, '--plane', 'none', *options)
    without = run_python('-m', 'mmprecond.landscape', CONFIG, work / 'iter_2.pth', *plain)
    assert without.returncode == 0, without.stderr[-1500:]
    assert "has curvature and the config's optimizer has none" in without.stdout + without.stderr
    with (out / 'spectrum.csv').open() as file:
        names = {row['spectrum'] for row in csv.DictReader(file)}
    assert names == {'Hessian', 'preconditioned Hessian'}
    for name in ('spectrum.png', 'surface.png', 'surface.csv'):
        assert (out / name).is_file(), name


def test_a_missing_checkpoint_is_one_line() -> None:
    pytest.importorskip('mmengine')
    done = run_python('-m', 'mmprecond.landscape', CONFIG, 'nothing.pth')
    assert done.returncode == 2
    assert 'there is no checkpoint nothing.pth' in done.stderr
