"""Dropped into a run of a toolbox's own tools/train.py, as a user of it would."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmprecond.datasets import make_shape_folders, make_shapes
from tests.support.paths import ROOT

CONFIGS = {'mmdet': 'faster-rcnn_r18_fpn_shapes_narrow.py', 'mmpretrain': 'resnet18_shapes-cls.py'}
#: What the toolbox's own configs train with is SGD.
ARGUMENTS = [
    'optim_wrapper.constructor=mmprecond.PrecondOptimWrapperConstructor',
    'optim_wrapper.optimizer._delete_=True',
    'optim_wrapper.optimizer.type=AdaNKFAC',
    'optim_wrapper.optimizer.lr=1e-4',
    'optim_wrapper.optimizer.weight_decay=0.2',
]
FOUR_LINES = """
custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(constructor='PrecondOptimWrapperConstructor', optimizer=dict(
    _delete_=True, type='Preconditioned', rule=dict(type='SGDM', lr=0.01, weight_decay=1e-4),
    layers=[dict(preconditioner=dict(type='NewtonKronecker', damping=0.1))]))
"""


def train(toolbox: str, folder: Path, config: Path, options: list[str]) -> dict:
    """Two iterations by the toolbox's script, from a folder of its own; the checkpoint."""
    package = Path(str(pytest.importorskip(toolbox).__file__)).parent
    script = shutil.copy(package / '.mim/tools/train.py', folder / 'train.py')
    data, detects = folder / 'data', toolbox == 'mmdet'
    for split in ('train', 'val'):
        (make_shapes if detects else make_shape_folders)(
            data, images=8, split=split, progress=False
        )
    options = [
        *options,
        'train_cfg.max_iters=2',
        'default_hooks.checkpoint.interval=2',
        f'train_dataloader.dataset.data_root={data}/',
        f'val_dataloader.dataset.data_root={data}/',
    ]
    if detects:
        options += [f'val_evaluator.ann_file={data}/annotations/val.json']
    done = subprocess.run(
        [sys.executable, str(script), str(config), '--work-dir', 'out', '--cfg-options', *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / 'out/iter_2.pth', weights_only=False)['optimizer']


@pytest.mark.parametrize('toolbox', CONFIGS)
def test_by_arguments_alone(toolbox: str, tmp_path: Path) -> None:
    """No file is changed: the dotted name of the constructor brings the package in."""
    config = ROOT / 'configs/quickstart' / CONFIGS[toolbox]
    assert 'mmprecond' not in config.read_text()
    state = train(toolbox, tmp_path, config, ARGUMENTS)
    assert state['precond']['layers']['backbone.conv1.weight']['refreshes'] == 2
    assert state['param_groups'][0]['betas'] == (0.9, 0.999)
    assert state['param_groups'][0]['weight_decay'] == 0.2


@pytest.mark.parametrize('toolbox', CONFIGS)
def test_by_four_lines_of_a_config(toolbox: str, tmp_path: Path) -> None:
    config = tmp_path / 'own.py'
    base = ROOT / 'configs/quickstart' / CONFIGS[toolbox]
    assert len(FOUR_LINES.strip().splitlines()) == 4
    config.write_text(f"_base_ = '{base}'\n{FOUR_LINES}")
    state = train(toolbox, tmp_path, config, [])
    layer = state['precond']['layers']['backbone.conv1.weight']
    assert layer['method'] == 'NewtonKronecker' and layer['refreshes'] == 2
    assert state['param_groups'][0]['lr'] == 0.01 or toolbox == 'mmdet'  # it warms up
