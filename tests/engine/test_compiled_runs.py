"""MMEngine's own ``compile=``, which compiles the whole training step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import Runner
from torch import nn
from torch._dynamo.utils import counters

from tests.support.classifier import Classifier, OneBatch
from tests.support.every_optimizer import MEASURED, SETTINGS

pytestmark = pytest.mark.usefixtures('fresh_compiler')


class Smooth(Classifier):
    """No bias has a gradient of rounding errors alone, which Adam would blow up."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 6)


def run(name: str, work_dir: Path, compile_: Any, iterations: int = 7, **wrapper: Any) -> Any:
    settings = dict(type=name, **SETTINGS[name])
    if name != 'Preconditioned':
        settings['lr'] = 1e-3
    if name in MEASURED and name not in ('Preconditioned', 'AdaAct'):
        settings |= dict(stat_interval=2, refresh_interval=4)
    settings.pop('total_steps', None)
    torch.manual_seed(0)
    runner = Runner(
        model=Smooth(),
        work_dir=str(work_dir),
        experiment_name=f'{work_dir.name}_{name}_{bool(compile_)}',
        train_dataloader=dict(
            dataset=OneBatch(),
            batch_size=8,
            num_workers=0,
            collate_fn=dict(type='default_collate'),
            sampler=dict(type='InfiniteSampler', shuffle=False),
        ),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iterations),
        optim_wrapper=dict(
            constructor='PrecondOptimWrapperConstructor', optimizer=settings, **wrapper
        ),
        default_hooks=dict(checkpoint=None),
        randomness=dict(seed=0),
        cfg=dict(compile=compile_) if compile_ else {},
    )
    runner.train()
    if hasattr(runner.optim_wrapper.optimizer, 'disarm'):
        runner.optim_wrapper.optimizer.disarm()  # the next step would measure: all runs eagerly
    return runner


def samples(runner: Any) -> dict[str, int]:
    state = runner.optim_wrapper.optimizer.state_dict().get('precond', {})
    return {name: layer['samples'] for name, layer in state.get('layers', {}).items()}


@pytest.mark.parametrize(
    'name', ['NKFAC', 'AdamR', 'AFOpt', 'AdaAct', 'SGDPH', 'SOAA', 'RAMDA', 'ARO']
)
def test_a_compiled_training_step_measures_and_trains_alike(name: str, tmp_path: Path) -> None:
    plain = run(name, tmp_path / 'plain', None)
    compiled = run(name, tmp_path / 'compiled', dict(backend='aot_eager'))
    always_eager = name in ('AdaAct', 'SGDPH')  # they measure at every step
    assert bool(counters['stats']['unique_graphs']) != always_eager
    assert samples(compiled) == samples(plain)
    for (key, ours), theirs in zip(
        compiled.model.state_dict().items(), plain.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, msg=lambda t: key + t)
