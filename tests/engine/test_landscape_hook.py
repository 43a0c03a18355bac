"""LandscapeHook: what it writes, and that the run goes on as without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import Runner
from torch import Tensor, nn

from mmprecond.engine import LandscapeHook
from tests.support.classifier import Classifier, OneBatch
from tests.support.errors import refused

HOOK = dict(type='LandscapeHook', iters=[2, 3, 5], steps=3, runs=1)


class Dropping(Classifier):
    """The classifier with dropout, which draws random numbers in training."""

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor') -> Any:
        return super().forward(
            nn.functional.dropout(inputs, 0.2, self.training), data_samples, mode
        )


def trained(folder: Path, hooks: list[dict[str, Any]], **loop: Any) -> Runner:
    torch.manual_seed(0)
    runner = Runner(
        model=Dropping(),
        work_dir=str(folder),
        experiment_name=folder.name,
        train_dataloader=dict(
            dataset=OneBatch(),
            batch_size=4,
            num_workers=0,
            collate_fn=dict(type='default_collate'),
            sampler=dict(type='InfiniteSampler' if 'max_iters' in loop else 'DefaultSampler'),
        ),
        train_cfg=loop,
        optim_wrapper=dict(
            constructor='PrecondOptimWrapperConstructor',
            accumulative_counts=2,
            optimizer=dict(type='NKFAC', lr=0.05, stat_interval=1, refresh_interval=2, max_rows=16),
        ),
        custom_hooks=hooks,
        randomness=dict(seed=0),
    )
    runner.train()
    return runner


def test_the_run_goes_on_as_without_it(tmp_path: Path) -> None:
    """With dropout, sampled rows, and a look in the middle of an accumulated step."""
    weights = [
        trained(tmp_path / name, hooks, type='IterBasedTrainLoop', max_iters=8).model.state_dict()
        for name, hooks in (('with', [HOOK]), ('without', []))
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    (scalars,) = tmp_path.glob('with/*/vis_data/scalars.json')
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    shown = [line for line in lines if 'landscape/largest' in line]
    assert [line['step'] for line in shown] == [2, 3, 5]
    names = ('largest', 'smallest', 'mean')
    assert set(shown[0]) == {
        'step',
        *(f'landscape/{p}{name}' for p in ('', 'preconditioned_') for name in names),
    }
    assert all(line['landscape/largest'] > 0 for line in shown)
    assert len(list(tmp_path.glob('with/*/landscape/iter_*/spectrum.csv'))) == 3


def test_epochs_are_counted_from_one(tmp_path: Path) -> None:
    hook = dict(type='LandscapeHook', epochs=[2], steps=2, runs=1, plane='random', points=2)
    trained(tmp_path, [hook], type='EpochBasedTrainLoop', max_epochs=2)
    (folder,) = tmp_path.glob('*/landscape/*')
    assert folder.name == 'epoch_2'
    assert {path.name for path in folder.iterdir()} >= {'spectrum.png', 'surface.csv'}


def test_what_it_refuses() -> None:
    refused(ValueError, LandscapeHook, 'write epochs=')
    refused(ValueError, lambda: LandscapeHook(epochs=[0]), '0')
    refused(ValueError, lambda: LandscapeHook(iters=[1], mode='test'), 'test')
    refused(ValueError, lambda: LandscapeHook(iters=[1], plane='x'), 'x')
    refused(TypeError, lambda: LandscapeHook(iters=[1], step=3), 'steps')
