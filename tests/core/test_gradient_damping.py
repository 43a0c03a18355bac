"""damping_form='gradient': its factor, the rule of the source, and steps with it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmprecond import KFAC, NKFAC
from mmprecond.core.gradient_damping import GradientDamping
from tests.reference.gradient_damping import Reference
from tests.support.classifier import Classifier, batch, build
from tests.support.errors import refused


@settings(max_examples=50, deadline=None)
@given(window=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_the_factor_is_that_of_plain_numbers(window: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    control, reference = GradientDamping(window), Reference(window)
    for step in range(20):
        gradients = [torch.randn(3, generator=generator).double() * 0.9**step for _ in range(2)]
        loss = float(torch.rand(1, generator=generator)) * 0.9**step
        control.record_gradients(gradients, torch.tensor(loss))
        reference.begin(float(torch.cat(gradients).norm()), torch.tensor(loss).double().item())
        if step % 2 == 0:
            assert control.update_factor() == pytest.approx(reference.refresh(), rel=1e-6)
        updates = [torch.randn(3, generator=generator).double() for _ in range(2)]
        control.record_updates(updates, [0.1, 0.2])
        reference.length = float(torch.cat([0.1 * updates[0], 0.2 * updates[1]]).norm())


@pytest.mark.parametrize(
    'loss, words', [(torch.ones(2), 'loss has the shape (2,)'), ('low', "loss='low' is no number")]
)
def test_a_loss_that_is_no_number_is_refused(loss: Any, words: str) -> None:
    optimizer = NKFAC(nn.Linear(4, 3), lr=0.1, damping_form='gradient')
    refused(ValueError, lambda: optimizer.take_loss(loss), words)


def test_full_steps_follow_the_rule_of_the_source() -> None:
    """x - g / (|g| / gamma) on a quadratic, with a window of one step."""
    curvature = torch.tensor([4.0, 1.0, 0.2]).double()
    x = torch.tensor([1.0, -2.0, 3.0]).double()
    control, gamma, before = GradientDamping(1), 1.0, None
    first = float((curvature * x).norm())
    for step in range(12):
        g, loss = curvature * x, float((curvature * x**2).sum() / 2)
        if before is not None:
            old_loss, damping = before
            gamma *= 2 if old_loss - loss >= float(g @ g) / (8 * damping) else 0.5
        control.record_gradients([g], torch.tensor(loss).double())
        control.update_factor()
        assert control.smoothness == pytest.approx(gamma), step
        damping = float(g.norm()) / (0.3 * gamma)
        control.record_updates([g / damping], [1.0])
        before = loss, damping
        x = x - g / damping
    assert first > 0 and gamma != 1.0


def test_what_is_not_finite_changes_nothing() -> None:
    control = GradientDamping(2)
    for loss in (1.0, float('nan'), 0.5, 0.4):
        gradient = torch.ones(2) if loss == loss else torch.tensor([float('inf'), 1.0])
        control.record_gradients([gradient], torch.tensor(loss))
        control.record_updates([torch.ones(2)], [0.1])
        assert 0 < control.update_factor() < float('inf')
    clean = GradientDamping(2)
    clean.record_gradients([torch.ones(2)], torch.tensor(1.0))
    norms, expected = (one.state_dict()['gradient_damping']['norms'] for one in (control, clean))
    assert {name: float(norms[name]) for name in ('first', 'average', 'last')} == pytest.approx(
        {name: float(expected[name]) for name in ('first', 'average', 'last')}
    )


def train(model: nn.Module, optimizer: Any, steps: int, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(64, 5, generator=generator).double()
    targets = torch.sin(inputs @ torch.randn(5, 2, generator=generator).double())
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.loss = loss
        optimizer.step()
        losses.append(float(loss))
    return losses


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2)).double()


@pytest.mark.parametrize('kind', [KFAC, NKFAC])
def test_refreshes_take_the_setting_times_the_factor(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    options = dict(lr=0.05, stat_interval=1, refresh_interval=5)
    optimizer = kind(model, damping_form='gradient', **options)
    method = type(optimizer.curvature.stacks[0].method)
    refresh, seen = method.refresh, []

    def spy(self: Any, factors: Any, previous: Any, damping: Any = None) -> Any:
        seen.append(torch.as_tensor(damping).flatten().tolist())
        return refresh(self, factors, previous, damping)

    monkeypatch.setattr(method, 'refresh', spy)
    train(model, optimizer, 12)
    factor = optimizer.curvature.dampings.gradient.factor
    setting = optimizer.param_groups[0]['damping']
    assert factor != pytest.approx(1.0)
    assert seen[-1] == pytest.approx([setting * factor] * len(seen[-1]))
    assert seen[0] == pytest.approx([setting] * len(seen[0]))


@pytest.mark.parametrize('kind', [KFAC, NKFAC])
def test_a_resumed_run_continues_to_the_bit(kind: Any) -> None:
    options = dict(lr=0.05, stat_interval=1, refresh_interval=3, damping_form='gradient')
    model = network()
    optimizer = kind(model, **options)
    train(model, optimizer, 8)
    other = copy.deepcopy(model)
    resumed = kind(other, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, 8) == train(other, resumed, 8)


@pytest.mark.parametrize('found', ['nothing', 'a part'])
def test_without_a_complete_state_the_control_starts_anew(
    found: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    settings: dict[str, Any] = dict(stat_interval=1, refresh_interval=3, damping_form='gradient')
    optimizer = KFAC(model, lr=0.05, **settings)
    train(model, optimizer, 8)
    state = copy.deepcopy(optimizer.state_dict())
    if found == 'nothing':
        del state['precond']
    else:
        del state['precond']['gradient_damping']['sums']
    optimizer.load_state_dict(state)
    assert optimizer.curvature.dampings.gradient.factor == 1.0
    told = any('no complete gradient_damping' in r.getMessage() for r in caplog.records)
    assert told == (found == 'a part')
    train(model, optimizer, 2)


def test_the_loss_is_asked_for_in_one_line() -> None:
    model = network()
    optimizer = KFAC(model, lr=0.1, damping_form='gradient')
    model(torch.randn(4, 5).double()).sum().backward()
    refused(ValueError, optimizer.step, "damping_form='gradient' needs the loss of each step")
    plain = KFAC(model, lr=0.1)
    assert not plain.needs_loss and optimizer.needs_loss
    plain.step()
    refused(ValueError, lambda: NKFAC(model, lr=0.1, damping_form='pi'), 'pi')


def test_mmengine_passes_the_mean_of_the_micro_batches() -> None:
    torch.manual_seed(0)
    model = Classifier()
    wrapper = build(
        model,
        accumulative_counts=2,
        optimizer=dict(
            type='NKFAC', lr=0.01, damping_form='gradient', stat_interval=1, refresh_interval=1
        ),
    )
    losses = [float(model.train_step(batch(seed=k), wrapper)['loss']) for k in range(2)]
    control = wrapper.optimizer.curvature.dampings.gradient
    assert control.state_dict()['gradient_damping']['before'] == pytest.approx(sum(losses) / 2)
