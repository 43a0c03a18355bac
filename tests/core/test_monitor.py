"""What is shown of refreshes: the numbers, their cost, and MMEngine's visualizer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine.runner import Runner
from torch import Tensor, nn

from mmprecond.core.monitor import Monitor, RefreshReport, fit_damping
from mmprecond.engine import CurvatureHook
from mmprecond.engine.hooks.curvature_hook import heat_map
from mmprecond.optimizers import FSGD, MAC, NKFAC, AdamR
from tests.support.classifier import Classifier, train_on_one_batch
from tests.support.errors import refused
from tests.support.networks import TokenNet, token_batches, train


def spd(n: int, blocks: int = 1) -> Tensor:
    x = torch.randn(blocks, n, 2 * n, generator=torch.Generator().manual_seed(0)).double()
    return x @ x.mT / n


@pytest.mark.parametrize('mu', [1e-3, 0.5])
def test_the_damping_of_an_inverse_is_found(mu: float) -> None:
    moment = spd(6, 2)
    inverse = torch.linalg.inv(moment + mu * torch.eye(6).double())
    found, residual = fit_damping(moment, inverse)
    assert float(found) == pytest.approx(mu) and float(residual) < 1e-9
    rough = inverse + 0.1 * inverse @ inverse
    assert float(fit_damping(moment, rough)[1]) > 1e-3


def run(kind: Any, steps: int, monitor: bool = True, **options: Any) -> Any:
    """The model, the optimizer, and its report after each step."""
    torch.manual_seed(0)
    model = TokenNet().double()
    optimizer = kind(model, lr=1e-3, **options, settings='published')
    if monitor:
        optimizer.curvature.watch_refreshes(Monitor())
    reports = []
    for one in token_batches(steps):
        train(model, optimizer, [one])
        reports.append(optimizer.curvature.monitor.report if monitor else None)
    return model, optimizer, reports


def test_the_numbers_are_those_of_the_layer() -> None:
    _, optimizer, (report,) = run(NKFAC, 1, damping=0.05)
    assert set(report.layers) == {'fc1.weight', 'fc2.weight', 'head.weight'}
    for stack in optimizer.curvature.stacks:
        for k, layer in stack.ready():
            values = report.layers[layer.name]
            for side in ('input', 'gradient'):
                largest = float(torch.linalg.eigvalsh(stack.statistics[f'{side}_moment'][k]).max())
                assert 0.85 * largest < values[f'largest/{side}'] < 1.001 * largest  # estimated
                wanted = max(1e-4, 0.05 * values[f'largest/{side}'])
                assert values[f'damping/{side}'] == pytest.approx(wanted, rel=1e-6)
                assert values[f'residual/{side}'] < 1e-6
    assert report.failures == 0 and report.seconds > 0
    held = sum(
        t.numel() * 8
        for s in optimizer.curvature.stacks
        for t in (*s.statistics.values(), *s.operator_tensors.values())
    )
    assert report.megabytes == pytest.approx(held / 2**20)


def test_newtons_residual_is_seen() -> None:
    _, _, reports = run(NKFAC, 5, stat_interval=1, refresh_interval=1, exact_interval=100)
    residuals = [report.summary()['residual/input/max'] for report in reports]
    assert max(residuals[:3]) < 1e-6 < residuals[4]


def test_the_cosine_is_that_of_the_step() -> None:
    model, optimizer, (report,) = run(FSGD, 1)
    gradients = {p: p.grad for p in model.parameters()}
    directions = optimizer.curvature.precondition(gradients, optimizer.param_groups)
    for name, module in (('fc1', model.fc1), ('fc2', model.fc2)):
        g = torch.cat([p.grad.flatten() for p in module.parameters()])
        v = torch.cat([directions[p].flatten() for p in module.parameters()])
        assert report.layers[f'{name}.weight']['cosine'] == pytest.approx(
            float(F.cosine_similarity(g, v, 0))
        )
    assert report.summary()['cosine/min'] == min(v['cosine'] for v in report.layers.values())


def test_ranks_are_counted() -> None:
    torch.manual_seed(0)
    model = nn.Linear(400, 5).double()
    optimizer = NKFAC(model, lr=0.1, rank_share=None, max_rows=None)
    optimizer.curvature.watch_refreshes(Monitor())
    (model(torch.randn(30, 400).double()) ** 2).mean().backward()
    optimizer.step()
    values = optimizer.curvature.monitor.report.layers['weight']
    columns = optimizer.curvature.stacks[0].operator_tensors['input_columns']
    assert values['rank/input'] == columns.shape[-1] > 0
    largest = float(
        torch.linalg.eigvalsh(optimizer.curvature.stacks[0].statistics['input_moment'])[0].max()
    )
    assert values['damping/input'] == pytest.approx(0.01 * largest, rel=0.2)


def test_a_root_has_no_damping() -> None:
    torch.manual_seed(0)
    model = nn.Linear(400, 5)
    optimizer = FSGD(model, lr=0.1, exponent=0.5)
    optimizer.curvature.watch_refreshes(Monitor())
    model(torch.randn(30, 400)).square().mean().backward()
    optimizer.step()
    values = optimizer.curvature.monitor.report.layers['weight']
    assert 'rank/input' in values and 'damping/input' not in values


def test_methods_that_act_after_the_rule_have_no_cosine() -> None:
    _, _, reports = run(AdamR, 3, stat_interval=1, refresh_interval=2)
    assert [report is not None for report in reports] == [False, True, False]
    assert all('cosine' not in values for values in reports[1].layers.values())
    _, _, (report,) = run(MAC, 1)
    assert all(set(values) == {'cosine'} for values in report.layers.values())


def test_it_costs_nothing_between_refreshes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr('mmprecond.core.monitor.describe', lambda stack, k: calls.append(k) or {})
    _, _, reports = run(NKFAC, 6, stat_interval=1, refresh_interval=3)
    assert [report is not None for report in reports] == [True, False, False] * 2
    assert len(calls) == 6  # three layers, two refreshes


def test_watching_changes_nothing() -> None:
    models = [
        run(NKFAC, 5, monitor, stat_interval=1, refresh_interval=2)[0] for monitor in (True, False)
    ]
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))


def test_failures_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmprecond.preconditioners import NewtonKronecker

    refresh = NewtonKronecker.refresh

    def failing(self: Any, statistics: Any, *rest: Any) -> Any:
        operator, good = refresh(self, statistics, *rest)
        return operator, torch.zeros_like(good)

    monkeypatch.setattr(NewtonKronecker, 'refresh', failing)
    _, _, (report,) = run(NKFAC, 1)
    assert report.failures == 3 and report.layers == {}


# ------------------------------------------------------------------- MMEngine


def trained(folder: Path, optimizer: dict[str, Any], backends: list[str]) -> Runner:
    torch.manual_seed(0)
    return train_on_one_batch(
        Classifier(),
        folder,
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=7),
        optim_wrapper=dict(constructor='PrecondOptimWrapperConstructor', optimizer=optimizer),
        custom_hooks=[dict(type='CurvatureHook', map_interval=2)],
        visualizer=dict(type='Visualizer', vis_backends=[dict(type=b) for b in backends]),
    )


@pytest.mark.slow
def test_scalars_and_heat_maps_reach_all_backends(tmp_path: Path) -> None:
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(
        tmp_path,
        dict(type='NKFAC', lr=0.05, stat_interval=1, refresh_interval=2, settings='published'),
        ['LocalVisBackend', 'TensorboardVisBackend'],
    )
    (scalars,) = tmp_path.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    shown = [line for line in lines if 'curvature/cosine/mean' in line]
    assert [line['step'] for line in shown] == [1, 3, 5, 7]
    assert {
        'curvature/damping/input/max',
        'curvature/largest/gradient/mean',
        'curvature/residual/input/max',
        'curvature/failures',
        'curvature/seconds',
        'curvature/megabytes',
    } <= set(shown[0])
    images = sorted(path.name for path in tmp_path.glob('*/vis_data/vis_image/*'))
    assert [name for name in images if 'cosine' in name] == [
        'curvature_cosine_3.png',
        'curvature_cosine_7.png',
    ]
    (events,) = tmp_path.glob('*/vis_data/events*')
    board = EventAccumulator(str(events)).Reload()
    assert len(board.Scalars('curvature/cosine/mean')) == 4
    assert 'curvature_cosine' in board.Tags()['images']


@pytest.mark.slow
def test_methods_without_matrices_are_not_stored(tmp_path: Path) -> None:
    """AdaAct refreshes at every step, and there is nothing to show of it."""
    runner = trained(tmp_path, dict(type='AdaAct', lr=0.05), ['LocalVisBackend'])
    hook = next(hook for hook in runner.hooks if isinstance(hook, CurvatureHook))
    assert not hook.history
    (scalars,) = tmp_path.glob('*/vis_data/scalars.json')
    assert 'curvature/' not in scalars.read_text()


def test_a_heat_map_is_an_image_or_nothing() -> None:
    history = [
        RefreshReport(step, {'a.weight': {'cosine': 0.1 * step}, 'b.weight': {}})
        for step in range(3)
    ]
    image = heat_map(history, 'cosine', False)
    assert image.ndim == 3 and image.dtype == 'uint8' and image.std() > 0
    assert heat_map(history, 'rank', False) is None


def test_it_is_for_optimizers_with_curvature() -> None:
    runner = SimpleNamespace(
        optim_wrapper=SimpleNamespace(
            optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
        )
    )
    refused(ValueError, lambda: CurvatureHook().before_train(runner), 'SGD')
    refused(ValueError, lambda: CurvatureHook(map_interval=0), 'map_interval=0')
