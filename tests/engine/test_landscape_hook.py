"""LandscapeHook: what it writes, and that the run goes on as without it."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from mmprecond.engine import LandscapeHook
from tests.support.classifier import Classifier, OneBatch, train_on_one_batch
from tests.support.distributed import leave
from tests.support.errors import refused

#: Of a message that no other rank answers.
TIMEOUT = timedelta(seconds=60)
HOOK = dict(type='LandscapeHook', iters=[2, 3, 5], steps=3, runs=1)


class Dropping(Classifier):
    """The classifier with dropout, which draws random numbers in training."""

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor') -> Any:
        return super().forward(
            nn.functional.dropout(inputs, 0.2, self.training), data_samples, mode
        )


def trained(folder: Path, hooks: list[dict[str, Any]], **loop: Any) -> Runner:
    torch.manual_seed(0)
    return train_on_one_batch(
        Dropping(),
        folder,
        batch_size=4,
        sampler='InfiniteSampler' if 'max_iters' in loop else 'DefaultSampler',
        train_cfg=loop,
        optim_wrapper=dict(
            constructor='PrecondOptimWrapperConstructor',
            accumulative_counts=2,
            optimizer=dict(type='NKFAC', lr=0.05, stat_interval=1, refresh_interval=2, max_rows=16),
        ),
        custom_hooks=hooks,
        randomness=dict(seed=0),
    )


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


class Reducing(Dropping):
    """A classifier whose loss has a collective operation, as those of many detectors."""

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor') -> Any:
        out = super().forward(inputs, data_samples, mode)
        if mode == 'loss':
            count = torch.tensor(float(len(inputs)))
            dist.all_reduce(count)
            out = dict(loss=out['loss'] * len(inputs) / count)
        return out


def worker(rank: int, folder: str) -> None:
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/init', rank=rank, world_size=2, timeout=TIMEOUT
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logged: list[dict[str, float]] = []
    model = Reducing()
    runner = SimpleNamespace(
        iter=0,
        model=MMDistributedDataParallel(model),
        optim_wrapper=None,
        train_dataloader=DataLoader(OneBatch(), 4, collate_fn=default_collate),
        log_dir=folder,
        visualizer=SimpleNamespace(add_scalars=lambda values, step: logged.append(values)),
    )
    LandscapeHook(iters=[1], steps=3, runs=1).after_train_iter(runner, 0)
    torch.save(logged[0], f'{folder}/{rank}.pth')
    leave()


def test_ranks_evaluate_a_loss_with_collectives_together(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pth') for rank in (0, 1))
    assert first == second and first['landscape/largest'] > 0
    assert (tmp_path / 'landscape/iter_1/spectrum.csv').is_file()


@pytest.mark.parametrize(
    'when, message',
    [(dict(epochs=[3]), 'give iters instead'), (dict(iters=[4, 9]), 'ends after 8')],
)
def test_what_never_comes_is_refused(tmp_path: Path, when: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained(
            tmp_path, [dict(type='LandscapeHook', **when)], type='IterBasedTrainLoop', max_iters=8
        )


def test_what_it_refuses() -> None:
    refused(ValueError, LandscapeHook, 'write epochs=')
    refused(ValueError, lambda: LandscapeHook(epochs=[0]), '0')
    refused(ValueError, lambda: LandscapeHook(iters=[1], mode='test'), 'test')
    refused(ValueError, lambda: LandscapeHook(iters=[1], plane='x'), 'x')
    refused(TypeError, lambda: LandscapeHook(iters=[1], step=3), 'steps')
