"""Nothing looks preconditioned and is not: loops of the user's own, and layers never measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmprecond.core import Monitor
from mmprecond.optimizers import NKFAC
from tests.support.classifier import Classifier, batch, build
from tests.support.errors import warnings_of
from tests.support.every_optimizer import HOOKED, MEASURED, SETTINGS, images, make, net, train


def settings_of(name: str) -> dict[str, Any]:
    given = dict(type=name, **SETTINGS[name])
    if name != 'Preconditioned':
        given |= dict(lr=0.01, stat_interval=1, refresh_interval=2)
    return given


@pytest.mark.parametrize('name', MEASURED)
@pytest.mark.parametrize('parts', [1, 2])
def test_a_loop_around_a_wrapper_measures_without_optim_context(name: str, parts: int) -> None:
    """As MMEngine's docstring of OptimWrapper shows it; the same weights as with it."""
    found = []
    for context in (True, False):
        torch.manual_seed(0)
        model = Classifier()
        model.norm = nn.GroupNorm(2, 6)
        wrapper = build(model, optimizer=settings_of(name), accumulative_counts=parts)
        wrapper.initialize_count_status(model, 0, 4 * parts)
        for seed in range(4 * parts):
            data = batch(seed=seed)
            if context:
                with wrapper.optim_context(model):
                    loss = model(**data, mode='loss')['loss']
            else:
                loss = model(**data, mode='loss')['loss']
            wrapper.update_params(loss)
        layers = wrapper.optimizer.state_dict()['precond']['layers']
        assert layers and all(state['samples'] >= 1 for state in layers.values())
        found.append(model.state_dict())
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key


def test_once_optim_context_is_used_it_brackets_all(caplog: pytest.LogCaptureFixture) -> None:
    model = Classifier()
    wrapper = build(model, optimizer=settings_of('NKFAC'))
    for seed in range(2):
        wrapper.update_params(model(**batch(seed=seed), mode='loss')['loss'])
    samples = wrapper.optimizer.state_dict()['precond']['layers']['fc.weight']['samples']
    assert samples == 2
    for seed in range(2):
        model(**batch(seed=9), mode='loss')['loss'].backward()  # a pass of one's own
        model.zero_grad()
        with wrapper.optim_context(model):
            loss = model(**batch(seed=seed), mode='loss')['loss']
        wrapper.update_params(loss)
    state = wrapper.optimizer.state_dict()['precond']['layers']['fc.weight']
    assert state['samples'] == 4 and not warnings_of(caplog)


# ------------------------------------------------------------------- the guard


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in warnings_of(caplog) if 'not measured by the last' in text]


@pytest.mark.parametrize('name', HOOKED)
def test_layers_that_are_never_measured_are_named_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Their weights are used by torch.func, which calls copies of nothing, but no hooks count."""
    model = net()
    optimizer = make(name, model)
    weights = dict(model.named_parameters())
    for step in range(9):
        optimizer.zero_grad()
        x, y = images(step)

        def loss(weights: Any, x: Any = x, y: Any = y) -> Any:
            return F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)

        for key, gradient in torch.func.grad(loss)(weights).items():
            weights[key].grad = gradient.detach()
        optimizer.step()
    (warning,) = said(caplog)
    assert 'stem.weight' in warning and 'torch.func' in warning


def test_gradients_that_are_cleared_too_late(caplog: pytest.LogCaptureFixture) -> None:
    """The optimizer clears statistics with gradients; a loop that keeps gradients apart is told."""
    model = net()
    optimizer = make('NKFAC', model)
    for step in range(9):
        x, y = images(step)
        F.cross_entropy(model(x), y).backward()
        kept = [p.grad.clone() for p in model.parameters()]
        optimizer.zero_grad()
        for p, gradient in zip(model.parameters(), kept, strict=True):
            p.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
    (warning,) = said(caplog)
    assert 'before the forward pass' in warning


def test_an_optimizer_that_was_disarmed(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    optimizer = make('NKFAC', model)
    optimizer.arm_by_hand()
    train('NKFAC', model, optimizer, range(7))
    (warning,) = said(caplog)
    assert 'disarmed' in warning


def test_a_single_layer_and_none_without_gradients(caplog: pytest.LogCaptureFixture) -> None:
    """Layers that are unused, frozen or used now and then are no matter."""
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ('used', 'rare', 'never', 'lost')})
    optimizer = NKFAC(model, lr=0.01, stat_interval=1, refresh_interval=2)
    for step in range(8):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.zero_grad(set_to_none=False)
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        out = model['used'](x)
        if step % 3 == 0:
            out = model['rare'](out)
        if step:
            out = F.linear(out, model['lost'].weight, model['lost'].bias)
        else:
            out = model['lost'](out)
        out.square().mean().backward()
        optimizer.step()
    (warning,) = said(caplog)
    assert '1 of the layers' in warning and 'lost.weight' in warning
    assert not any('never' in text for text in warnings_of(caplog))


# ------------------------------------------------------------------- counts


def test_the_table_and_the_monitor_count_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3), nn.Linear(3, 2))
    model[3].requires_grad_(False)
    optimizer = NKFAC(model, lr=0.01, stat_interval=1, refresh_interval=2)
    assert '0 of 3 layers measured so far, 0 with an operator' in optimizer.table()
    monitor = Monitor()
    optimizer.curvature.watch_refreshes(monitor)
    model(torch.randn(6, 4)).square().mean().backward()
    optimizer.step()
    assert '2 of 3 layers measured so far, 2 with an operator' in optimizer.table()
    summary = monitor.take_report().summary()
    for kind in ('measured', 'preconditioned', 'plain'):
        assert summary[f'layers/{kind}'] == 2
