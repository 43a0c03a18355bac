"""Whole runs: resume through MMEngine's Runner, the tools, the quickstart end to end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmprecond.datasets import make_shape_folders, make_shapes
from tests.support.classifier import Classifier, OneBatch
from tests.support.paths import ROOT

QUICK = 'configs/quickstart/faster-rcnn_r18_fpn_shapes'


def run(work_dir: Path, iterations: int, resume: bool = False, **wrapper: Any) -> Runner:
    torch.manual_seed(0)
    runner = Runner(
        model=Classifier(),
        work_dir=str(work_dir),
        resume=resume,
        experiment_name=f'{work_dir.name}_{iterations}_{resume}',
        train_dataloader=dict(
            dataset=OneBatch(),
            batch_size=8,
            num_workers=0,
            collate_fn=dict(type='default_collate'),
            sampler=dict(type='InfiniteSampler', shuffle=False),
        ),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iterations),
        optim_wrapper=dict(
            constructor='PrecondOptimWrapperConstructor',
            optimizer=dict(type='NKFAC', lr=0.05, stat_interval=1, refresh_interval=2),
            **wrapper,
        ),
        param_scheduler=dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=20),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=7)),
        randomness=dict(seed=0),
    )
    runner.train()
    return runner


@pytest.mark.parametrize('wrapper', [{}, dict(paramwise_cfg=dict(bypass_duplicate=True))])
def test_resume_equals_uninterrupted(tmp_path: Path, wrapper: dict[str, Any]) -> None:
    whole = run(tmp_path / 'whole', 14, **wrapper)
    run(tmp_path / 'parts', 7, **wrapper)
    parts = run(tmp_path / 'parts', 14, resume=True, **wrapper)
    assert parts.optim_wrapper.optimizer.t == 14
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name
    ours, theirs = (r.optim_wrapper.optimizer.state_dict()['precond'] for r in (whole, parts))
    assert ours['layers'].keys() == theirs['layers'].keys() == {'conv.weight', 'fc.weight'}
    for layer in ours['layers']:
        for kind in ('statistics', 'operator'):
            for name, value in ours['layers'][layer][kind].items():
                assert torch.equal(value, theirs['layers'][layer][kind][name])


def tool(*command: object, expect: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=500,
    )
    output = done.stdout + done.stderr
    assert done.returncode == expect, output[-4000:]
    return output


def small(data: Path, iterations: int = 2) -> list[str]:
    return [
        f'train_dataloader.dataset.data_root={data}/',
        f'val_dataloader.dataset.data_root={data}/',
        f'test_dataloader.dataset.data_root={data}/',
        f'val_evaluator.ann_file={data}/annotations/val.json',
        f'test_evaluator.ann_file={data}/annotations/val.json',
        f'train_cfg.max_iters={iterations}',
        f'train_cfg.val_interval={iterations}',
        'train_dataloader.batch_size=2',
        'optim_wrapper.optimizer.lr=0.001',
        'default_hooks.logger.interval=1',
        'model.train_cfg.rpn_proposal.max_per_img=50',
        'model.test_cfg.rpn.max_per_img=20',
    ]


@pytest.fixture(scope='module')
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('shapes')
    for split in ('train', 'val'):
        make_shapes(out, images=8, size=96, split=split, progress=False)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ('model', 'names'),
    [
        ('r18', ['SGD', 'NKFAC']),
        ('swin', ['AdamW', 'AdaAFOpt', 'AFOpt+NKFAC', 'AFOpt+AdamR']),
        ('resnet-cls', ['SGD', 'NKFAC']),
        ('swin-cls', ['AdamW', 'AdaAFOpt', 'AFOpt+NKFAC', 'AFOpt+AdamR']),
    ],
)
def test_quickstart_end_to_end(tmp_path: Path, model: str, names: list[str]) -> None:
    options = ['train_dataloader.batch_size=2', 'default_hooks.logger.interval=1']
    if not model.endswith('cls'):
        options += [
            'model.train_cfg.rpn_proposal.max_per_img=50',
            'model.test_cfg.rpn.max_per_img=20',
        ]
    output = tool(
        'bash',
        'tools/quickstart.sh',
        '--model',
        model,
        '--iterations',
        2,
        '--val-interval',
        2,
        '--images',
        16,
        '--data',
        tmp_path / 'data',
        '--work-dir',
        tmp_path / 'out',
        '--grid',
        '',
        '--lr',
        0.001,
        '--options',
        *options,
    )
    runs = json.loads((tmp_path / 'out/results.json').read_text())
    assert [run['optimizer'] for run in runs] == names
    assert all(re.search(rf'\| {re.escape(name)} +\| 0.001 +\|', output) for name in names)
    assert ('mask AP' in output) == (model == 'swin')
    assert all(len(run['losses']) == 2 for run in runs)
    for run in runs:  # one evaluation, and CocoMetric gave numbers
        assert run['scores'] and all(len(points) == 1 for points in run['scores'].values())
    # The same weights and images: only the optimizer differs, so the first loss does not.
    first, *others = runs
    for other in others:
        assert first['losses'][0][2] == pytest.approx(other['losses'][0][2], rel=1e-6)
        assert first['losses'][1][2] != pytest.approx(other['losses'][1][2], rel=1e-5)
    assert (tmp_path / 'out/quickstart.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
@pytest.mark.parametrize(
    'name',
    ['resnet18_shapes-cls', 'swin_shapes-cls', 'vgg11_shapes-cls', 'vgg11-wn_shapes-cls_sgdph'],
)
def test_classifiers_train_with_the_partial_hessian(tmp_path: Path, name: str) -> None:
    """With normalisation and without; lengths of weights survive the checkpoint."""
    for split in ('train', 'val'):
        make_shape_folders(tmp_path / 'data', images=8, split=split, progress=False)
    options = [
        '--cfg-options',
        'train_cfg.max_iters=4',
        'train_cfg.val_interval=4',
        'train_dataloader.batch_size=4',
        'optim_wrapper.optimizer.lr=0.01',
        *(
            f'{part}_dataloader.dataset.data_root={tmp_path}/data/'
            for part in ('train', 'val', 'test')
        ),
    ]
    config = f'configs/quickstart/{name}.py'
    chosen = [] if name.endswith('sgdph') else ['--optimizer', 'SGDPH']
    work_dir = ['--work-dir', tmp_path / 'out']
    tool(sys.executable, 'tools/train.py', config, *work_dir, *chosen, *options)
    checkpoint = tmp_path / 'out/iter_4.pth'
    saved = torch.load(checkpoint, weights_only=False)
    states = saved['optimizer']['state'].values()
    measured = [state['hessian'] for state in states if 'hessian' in state]
    lengths = [key for key in saved['state_dict'] if key.endswith('weight.original0')]
    assert len(lengths) == (8 if 'wn' in name else 0)
    assert len(measured) > 8 and all(h.isfinite().all() and (h >= 0).all() for h in measured)
    assert any(h.any() for h in measured)
    assert all(value.isfinite().all() for value in saved['state_dict'].values())
    output = tool(sys.executable, 'tools/test.py', config, checkpoint, *work_dir, *options)
    assert 'accuracy/top1' in output and 'unexpected key' not in output


@pytest.mark.slow
def test_two_processes_without_a_gpu(tmp_path: Path, shapes: Path) -> None:
    output = tool(
        'bash',
        'tools/dist_train.sh',
        f'{QUICK}_nkfac.py',
        2,
        '--work-dir',
        tmp_path,
        '--cfg-options',
        *small(shapes),
        PORT='29611',
    )
    assert 'mmprecond attached NKFAC to ' in output and 'coco/bbox_mAP' in output
    checkpoint = torch.load(tmp_path / 'iter_2.pth', weights_only=False)
    assert checkpoint['optimizer']['precond']['steps'] == 2


@pytest.mark.slow
def test_train_resume_and_test(tmp_path: Path, shapes: Path) -> None:
    train = [
        sys.executable,
        'tools/train.py',
        f'{QUICK}.py',
        '--optimizer',
        'NKFAC',
        '--work-dir',
        tmp_path,
    ]
    tool(*train, '--cfg-options', *small(shapes, 1), 'default_hooks.checkpoint.interval=1')
    output = tool(*train, '--resume', '--cfg-options', *small(shapes, 2))
    assert 'resumed epoch: 0, iter: 1' in output
    assert (
        torch.load(tmp_path / 'iter_2.pth', weights_only=False)['optimizer']['precond']['steps']
        == 2
    )
    output = tool(
        sys.executable,
        'tools/test.py',
        f'{QUICK}.py',
        tmp_path / 'iter_2.pth',
        '--work-dir',
        tmp_path / 'test',
        '--cfg-options',
        *small(shapes),
    )
    assert 'coco/bbox_mAP' in output


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['no/such.py'], 'there is no config no/such.py'),
        ([f'{QUICK}.py', '--amp'], '--amp needs a GPU'),
        ([f'{QUICK}.py', '--optimizer', 'KNFAC'], 'choose one of AFOpt'),
        (
            [f'{QUICK}_nkfac.py', '--cfg-options', 'optim_wrapper.optimizer.damping=-1'],
            'damping=-1',
        ),
        (
            [f'{QUICK}_nkfac.py', '--cfg-options', 'optim_wrapper.optimizer.dampnig=1'],
            'dampnig; did you mean damping',
        ),
        ([f'{QUICK}.py', '--cfg-options', 'foo'], "--cfg-options takes KEY=VALUE, got 'foo'"),
        (
            [f'{QUICK}.py', '--cfg-options', 'train_dataloader.dataset.data_root=/none/'],
            '/none/annotations/train.json (train_dataloader), /none/train/ (train_dataloader)',
        ),
        ([f'{QUICK}.py', '--launcher', 'pytorch'], 'RANK is not set'),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import train

    if torch.cuda.is_available() and '--amp' in arguments:
        pytest.skip('there is a GPU')
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', ['train.py', *arguments, '--work-dir', str(tmp_path)])
    monkeypatch.setenv('LOCAL_RANK', '0')  # which the tool would leave behind
    with pytest.raises(SystemExit) as ended:
        train.main()
    said = capfd.readouterr()
    output = said.out + said.err
    assert ended.value.code == 2 and message in ''.join(output.splitlines()[-2:])
    assert len(output.splitlines()) < 12  # neither the environment nor the config was logged


def test_an_error_ends_the_process_without_a_traceback(tmp_path: Path) -> None:
    arguments = [f'{QUICK}.py', '--optimizer', 'KNFAC', '--work-dir', tmp_path]
    output = tool(sys.executable, 'tools/train.py', *arguments, expect=2)
    assert 'choose one of AFOpt' in output and 'Traceback' not in output


@pytest.mark.slow
def test_errors_of_several_processes_come_once(tmp_path: Path) -> None:
    options = ['--cfg-options', 'train_dataloader.dataset.data_root=/none/']
    command = ['bash', 'tools/dist_train.sh', f'{QUICK}.py', 2, '--work-dir', tmp_path, *options]
    output = tool(*command, expect=2, PORT='29612')
    assert output.count('the data are not there') == 1 and 'Traceback' not in output
    assert len(output.splitlines()) < 12


def test_three_lines_equal_the_preset() -> None:
    from mmprecond.engine import use_optimizer

    preset = Config.fromfile(ROOT / f'{QUICK}.py')
    use_optimizer(preset, 'NKFAC')
    by_hand = Config.fromfile(ROOT / f'{QUICK}_nkfac.py')
    assert preset.optim_wrapper.optimizer == by_hand.optim_wrapper.optimizer
    assert preset.optim_wrapper.constructor == by_hand.optim_wrapper.constructor
