"""SKFAC over a run: states, odd batches, wrong settings, hooks, precision, graphs."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmprecond.optimizers import KFAC, SKFAC, Preconditioned
from tests.support.errors import refused, warnings_of
from tests.support.hooks import Waits, hooks_of
from tests.support.late_layers import Net
from tests.support.late_layers import train as train_net
from tests.support.samples import Scaler, loss_of
from tests.support.sketches import EVERY, Tall, close, entry, factors, images, measure
from tests.support.states import differences, everything, saved, walk
from tests.support.trajectories import make_loss

# ------------------------------------------------------------------- state, odd batches


def resumable(model: nn.Module, **settings: Any) -> SKFAC:
    return SKFAC(
        model,
        lr=0.05,
        weight_decay=0.01,
        **dict(dict(stat_interval=1, refresh_interval=2, positions=3, max_columns=4), **settings),
        settings='published',
    )


@pytest.mark.parametrize(
    'settings',
    [
        {},
        dict(reduction='reduce'),
        dict(max_columns=9),
        dict(damping_form='relative', damping=0.01),
        dict(solver='inverse', stat_decay=0.9),
    ],
    ids=str,
)
@pytest.mark.parametrize('at', [1, 4])
def test_a_resumed_run_continues_bit_for_bit(at: int, settings: dict[str, Any]) -> None:
    """In float32, with more rows than slots, and a layer that is used from step 3 on."""
    model = Net()
    optimizer = resumable(model, **settings)
    train_net(model, optimizer, range(at))
    state = optimizer.state_dict()
    assert walk(state) == []
    twin = copy.deepcopy(model)
    resumed = resumable(twin, **settings)
    resumed.load_state_dict(saved(state))
    train_net(model, optimizer, range(at, 8)), train_net(twin, resumed, range(at, 8))
    assert differences(everything(model, optimizer), everything(twin, resumed)) == []
    # At steps 3, 4 and 6: a layer without statistics waits for no refresh.
    assert entry(resumed, 'late.weight')['refreshes'] == 3


def test_a_state_loaded_after_draws_of_the_same_step_continues_bit_for_bit() -> None:
    model = Net()
    optimizer = resumable(model)
    train_net(model, optimizer, range(4))
    state = saved(optimizer.state_dict())
    twin = copy.deepcopy(model)
    again = resumable(twin)
    again.load_state_dict(copy.deepcopy(state))
    twin.eval()
    twin(torch.randn(2, 2, 5, 5), late=True).sum().backward()
    twin.train()
    again.load_state_dict(state)
    train_net(model, optimizer, range(4, 6)), train_net(twin, again, range(4, 6))
    assert differences(everything(model, optimizer), everything(twin, again)) == []


@pytest.mark.parametrize(
    'settings', [dict(max_columns=3), dict(max_columns=300), dict(reduction='reduce')], ids=str
)
def test_a_state_of_other_columns_is_measured_anew(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = Net()
    optimizer = resumable(model)
    train_net(model, optimizer, range(3))
    other = resumable(model, **settings)
    other.load_state_dict(saved(optimizer.state_dict()))
    (message,) = warnings_of(caplog)
    assert 'measured anew' in message and 'input_columns' in message and '\n' not in message
    train_net(model, other, range(3, 5))
    assert entry(other, 'conv.weight')['refreshes'] >= 1
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    'make', [SKFAC, lambda *a, **k: KFAC(*a, reduction='reduce', **k, settings='published')]
)
def test_a_state_with_one_layer_not_yet_refreshed(make: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = make(model, lr=0.1)
    loss_of(model(torch.randn(3, 4))).backward()
    optimizer.step()
    state = saved(optimizer.state_dict())
    state['precond']['layers']['1.weight'].update(operator={}, refreshes=0)
    optimizer.load_state_dict(state)


def test_a_frozen_layer_costs_nothing_until_it_thaws() -> None:
    model = Net()
    model.early.weight.requires_grad_(False)
    optimizer = resumable(model)
    train_net(model, optimizer, range(3))
    assert set(optimizer.state_dict()['precond']['layers']) == {'conv.weight', 'last.weight'}
    model.early.weight.requires_grad_(True)
    train_net(model, optimizer, range(3, 6))
    assert entry(optimizer, 'early.weight')['refreshes'] == 2


EMPTY: list[Any] = [
    (lambda: nn.Linear(4, 3), (0, 4), (2, 4)),
    (lambda: nn.Linear(4, 3), (0, 7, 4), (2, 4)),
    (lambda: nn.Linear(4, 3), (2, 0, 4), (2, 3, 4)),
    (lambda: nn.Conv2d(4, 4, 3, groups=2), (0, 4, 5, 5), (2, 4, 3, 3)),
]


@pytest.mark.parametrize('make, shape, usual', EMPTY)
@pytest.mark.parametrize('max_columns', [1, 100])
def test_calls_without_rows(
    make: Any, shape: tuple[int, ...], usual: tuple[int, ...], max_columns: int
) -> None:
    """Alone they leave no statistic, beside a full one they add nothing."""
    torch.manual_seed(0)
    module = make().double()
    empty, full = torch.zeros(shape).double(), torch.randn(usual).double()
    optimizer = measure(module, empty, make=SKFAC, max_columns=max_columns)
    assert optimizer.state_dict()['precond']['layers'] == {}
    found = [
        factors(measure(copy.deepcopy(module), *inputs, make=SKFAC, max_columns=max_columns))
        for inputs in ((full,), (empty, full), (full, empty))
    ]
    for other in found[1:]:
        close(other, found[0])


def test_a_sample_that_is_not_finite_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    optimizer = resumable(model)
    train_net(model, optimizer, range(2))
    before = copy.deepcopy(entry(optimizer, 'last.weight'))
    optimizer.zero_grad()
    (model(torch.full((2, 2, 5, 5), float('inf')), late=False)).sum().backward()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert any('non-finite' in message for message in warnings_of(caplog))
    after = entry(optimizer, 'last.weight')
    assert differences(before['statistics'], after['statistics']) == []
    assert all(v.isfinite().all() for v in after['operator'].values())


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize(
    'settings',
    [{}, dict(damping_form='relative'), dict(reduction='reduce'), dict(scaling='norm_recovery')],
    ids=str,
)
def test_a_batch_of_one(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """One row, with many more slots than rows; in a map of one position and of many."""
    for module, shape in (
        (nn.Linear(30, 20), (1, 30)),
        (nn.Conv2d(8, 20, 3), (1, 8, 3, 3)),
        (nn.Conv2d(8, 40, 3, groups=2), (8, 4, 5)),
    ):
        module = module.to(dtype)
        optimizer = SKFAC(module, lr=0.1, max_columns=16, **EVERY, **settings, settings='published')
        before = [p.detach().clone() for p in module.parameters()]
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(module(torch.randn(shape, dtype=dtype))).backward()
            optimizer.step()
        assert entry(optimizer)['refreshes'] == 3
        assert all(p.isfinite().all() for p in module.parameters())
        assert all((p != old).any() for p, old in zip(module.parameters(), before, strict=True))


# ------------------------------------------------------------------- wrong settings


@pytest.mark.parametrize(
    'settings, fragments',
    [
        (dict(stat_decay=0.5), ['stat_decay=0', "'woodbury'"]),
        (dict(reduction='expand'), ["reduction='sample'", "'expand'"]),
        (dict(positions=0), ['positions=0']),
        (dict(positions=2.0), ['positions=2.0']),
        (dict(max_columns=0), ['max_columns=0']),
        (dict(max_columns=True), ['max_columns=True']),
        (dict(solver='lu'), ['inverse, woodbury']),
    ],
    ids=str,
)
def test_wrong_settings(settings: dict[str, Any], fragments: list[str]) -> None:
    refused(
        ValueError,
        lambda: SKFAC(nn.Linear(2, 2), lr=0.1, **settings, settings='published'),
        *fragments,
    )


def test_woodbury_needs_settings_of_its_own() -> None:
    refused(
        ValueError,
        lambda: KFAC(nn.Linear(2, 2), lr=0.1, solver='woodbury', settings='published'),
        'stat_decay=0',
        "reduction='sample'",
        'stat_decay=0.95',
        "reduction='expand'",
    )
    for reduction in ('sample', 'reduce'):
        KFAC(
            nn.Linear(2, 2),
            lr=0.1,
            solver='woodbury',
            stat_decay=0.0,
            reduction=reduction,
            settings='published',
        )


# ------------------------------------------------------------------- captures that serve


@pytest.mark.parametrize(
    'make', [SKFAC, lambda *a, **k: KFAC(*a, stat_decay=0.0, **k, settings='published')]
)
def test_nothing_is_captured_between_refreshes(make: Any) -> None:
    model = Tall()
    optimizer = make(model, lr=0.01, stat_interval=1, refresh_interval=4, early_refreshes=False)
    for step in range(10):
        optimizer.zero_grad()
        make_loss(images(step).float())(model).backward()
        assert bool(hooks_of(model)) == (step % 4 == 0)
        optimizer.step()
    assert entry(optimizer, 'head.weight')['samples'] == 3


# ------------------------------------------------------------------- precision, graphs


@pytest.mark.parametrize('max_columns', [2, 100])
@pytest.mark.parametrize('reduction', ['sample', 'reduce'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_statistics_are_float32(dtype: torch.dtype, reduction: str, max_columns: int) -> None:
    """Of half-precision models and under autocast; squares of 1e-6 do not vanish."""
    torch.manual_seed(0)
    for whole in (True, False):
        for module, shape in ((nn.Linear(6, 4), (3, 5, 6)), (nn.Conv2d(6, 4, 3), (3, 6, 5, 5))):
            module = module.to(dtype) if whole else module
            x = torch.randn(shape).to(dtype if whole else torch.float32)
            optimizer = SKFAC(
                module, lr=0.0, reduction=reduction, max_columns=max_columns, settings='published'
            )
            with torch.autocast('cpu', dtype, enabled=not whole):
                out = module(x)
            assert out.dtype == dtype
            (out * 1e-4).float().sum().backward()
            optimizer.step()
            for kind in ('statistics', 'operator'):
                assert all(v.dtype == torch.float32 for v in entry(optimizer)[kind].values())
            assert all(f.isfinite().all() and f.norm() > 0 for f in factors(optimizer))


@pytest.mark.parametrize('scale', [256.0, Scaler()], ids=['number', 'scaler'])
def test_the_loss_scale_is_divided_out(scale: Any) -> None:
    found = []
    for given in (None, scale):
        torch.manual_seed(0)
        module = nn.Conv2d(2, 9, 3).double()
        optimizer = SKFAC(module, lr=0.0, max_columns=5, positions=3, settings='published')
        optimizer.loss_scale = given
        (
            loss_of(module(torch.randn(3, 2, 5, 5).double())) * (1.0 if given is None else 256.0)
        ).backward()
        optimizer.step()
        found.append(factors(optimizer))
    close(*found)


def test_a_plain_step_never_waits_for_the_device() -> None:
    model = Net()
    optimizer = resumable(model, stat_interval=3, refresh_interval=3)
    for step in range(5):
        with Waits() as waits:
            train_net(model, optimizer, range(step, step + 1))
        assert bool(waits.seen) == (step % 3 == 0), waits.seen


def test_layers_with_columns_of_their_own() -> None:
    """Several settings in one model, and the same for layers of one shape."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(20, 20) for _ in range(3)])
    entries = [
        dict(
            match=dict(name=str(k)),
            preconditioner=dict(
                type='FisherKronecker',
                solver='woodbury',
                stat_decay=0.0,
                reduction=reduction,
                max_columns=columns,
                settings='published',
            ),
        )
        for k, (reduction, columns) in enumerate([('sample', 4), ('reduce', 7), ('sample', 21)])
    ]
    optimizer = Preconditioned(model, rule=dict(type='SGDM', lr=0.1), layers=entries)
    loss_of(model(torch.randn(3, 5, 20))).backward()
    optimizer.step()
    shapes = [
        [tuple(v.shape) for v in entry(optimizer, f'{k}.weight')['operator'].values()]
        for k in range(3)
    ]
    assert [sorted(s)[-1][-1] for s in shapes] == [4, 7, 21] and len(shapes[2]) == 2
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('way', ['in place', 'checkpoint', 'reentrant', 'extra forward'])
def test_graphs_of_other_kinds(way: str) -> None:
    """Recomputed, changed in place, after passes without gradient: the same rows and signs."""
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, 5).double().requires_grad_()
    found = []
    for kind in ('plain', way):
        for module in (nn.Conv2d(2, 9, 3, padding=1), nn.Linear(5, 9)):
            torch.manual_seed(1)
            module = copy.deepcopy(module).double()
            for p in module.parameters():
                nn.init.normal_(p)
            optimizer = SKFAC(module, lr=0.0, max_columns=4, positions=3, settings='published')
            part = lambda x: F.relu(module(x), inplace=kind == 'in place')
            if kind == 'extra forward':
                module(x)
                with torch.no_grad():
                    module(x)
            again = kind in ('checkpoint', 'reentrant')
            out = checkpoint(part, x, use_reentrant=kind == 'reentrant') if again else part(x)
            loss_of(out).backward()
            optimizer.step()
            found.append(copy.deepcopy(entry(optimizer)))
    assert differences(found[:2], found[2:]) == []


def test_a_copied_model_leaves_the_draws_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    twin = copy.deepcopy(model)
    optimizer, other = resumable(model), resumable(twin)
    for step in range(4):
        average = copy.deepcopy(model)
        average(torch.randn(2, 2, 5, 5), late=True).sum().backward()
        train_net(model, optimizer, range(step, step + 1))
        train_net(twin, other, range(step, step + 1))
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        assert differences(everything(model, optimizer), everything(twin, other)) == []
    assert warnings_of(caplog) == []
