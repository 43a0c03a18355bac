"""What must always hold (design.md): invariants 1-3 and 6, copies, evaluation."""

from __future__ import annotations

import copy
import gc
import io
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mmprecond
from mmprecond.curvature import Capture
from mmprecond.optimizers import NKFAC, AdaNKFAC, PreconditionedOptimizer
from tests.reference.factors import plain_copy
from tests.support.hooks import Net, backward, hooks_of, images, train
from tests.support.states import curvature, same


def make(**options: Any) -> tuple[Net, NKFAC]:
    model = Net()
    settings = dict(stat_interval=1, refresh_interval=1)
    return model, NKFAC(model, lr=0.05, **{**settings, **options}, settings='published')


# ------------------------------------------------------------------- 1: off a statistics step


def test_hooks_exist_on_statistics_steps_alone() -> None:
    model, optimizer = make(stat_interval=3, refresh_interval=3)
    for step in range(7):
        due = step % 3 == 0
        assert hooks_of(model) == 0  # between steps
        backward(model, step)
        assert bool(hooks_of(model)) == due
        carrying = [bool(out._backward_hooks) for out in model.outputs]
        assert carrying == [due, due]
        assert bool(optimizer.curvature.capture.staged) == due
        optimizer.step()
        optimizer.zero_grad()


def test_disarm_takes_all_hooks_off_and_arm_puts_each_on_once() -> None:
    model, optimizer = make()
    assert hooks_of(model) == 0  # before the first forward pass
    optimizer.arm()
    once = hooks_of(model)
    optimizer.arm()
    assert hooks_of(model) == once > 0
    optimizer.disarm()
    assert hooks_of(model) == 0


def test_an_optimizer_that_does_not_arm_itself_leaves_the_model_alone() -> None:
    model, optimizer = make()
    optimizer.arm_by_hand()
    optimizer.disarm()
    train(model, optimizer, range(2))
    assert hooks_of(model) == 0 and curvature(optimizer) == {}


# ------------------------------------------------------------------- 2: staged, merged, dropped


def set_to_zero(model: nn.Module, optimizer: NKFAC) -> None:
    model.zero_grad(set_to_none=False)


def set_to_none(model: nn.Module, optimizer: NKFAC) -> None:
    model.zero_grad()


def optimizers_own(model: nn.Module, optimizer: NKFAC) -> None:
    optimizer.zero_grad()


def optimizers_own_to_zero(model: nn.Module, optimizer: NKFAC) -> None:
    optimizer.zero_grad(set_to_none=False)


CLEARINGS = [set_to_zero, set_to_none, optimizers_own, optimizers_own_to_zero]


@pytest.mark.parametrize('clear', CLEARINGS)
def test_a_cleared_backward_pass_leaves_no_trace(clear: Callable[..., None]) -> None:
    found = []
    for abandoned in (0, 1, 2):
        model, optimizer = make()
        train(model, optimizer, range(1))
        clear(model, optimizer)
        for k in range(abandoned):
            backward(model, step=10 + k, factor=3.0)
            clear(model, optimizer)
        backward(model, step=1)
        optimizer.step()
        found.append(curvature(optimizer) | dict(model.named_parameters()))
    assert same(found[1], found[0]) and same(found[2], found[0])


@pytest.mark.parametrize('clear', CLEARINGS)
def test_gradients_may_be_cleared_between_forward_and_backward(clear: Callable[..., None]) -> None:
    """Forward, zero_grad, backward, step: a common order, here after a pass that was left."""
    found = []
    for abandoned in (0, 1):
        model, optimizer = make()
        for step in range(10, 10 + abandoned):
            loss = (model(images(step)) ** 2).mean()
            clear(model, optimizer)
            loss.backward()
        loss = (model(images(1)) ** 2).mean()
        clear(model, optimizer)
        loss.backward()
        optimizer.step()
        found.append(curvature(optimizer))
    assert same(found[1], found[0])


@pytest.mark.parametrize('bad', [float('inf'), float('nan')])
def test_non_finite_captures_never_reach_the_statistics(
    bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = make()
    train(model, optimizer, range(2))
    before, weights = curvature(optimizer), copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        backward(model, step=2, factor=bad)
        for p in model.parameters():
            p.grad.zero_()
        optimizer.step()
    messages = [r.getMessage() for r in caplog.records]
    assert len([m for m in messages if 'conv.weight' in m and 'non-finite' in m]) == 1
    after = curvature(optimizer)
    assert all(torch.equal(after[k], v) for k, v in before.items() if '/statistics/' in k)
    model.load_state_dict(weights)
    train(model, optimizer, range(3, 5))
    assert all(v.isfinite().all() for v in curvature(optimizer).values())
    assert not same(curvature(optimizer), before)


def test_a_non_finite_capture_of_one_layer_leaves_the_others() -> None:
    model = nn.ModuleDict({'good': nn.Linear(3, 2), 'bad': nn.Linear(3, 2)})
    optimizer = NKFAC(model, lr=0.1, settings='published')
    x = torch.randn(5, 3)
    (model['good'](x).sum() + (model['bad'](x) * float('inf')).sum()).backward()
    optimizer.step()
    layers = optimizer.state_dict()['precond']['layers']
    assert list(layers) == ['good.weight']
    assert all(v.isfinite().all() for v in curvature(optimizer).values())


def test_an_overflow_step_under_a_scaler_does_not_happen_for_us() -> None:
    """GradScaler does not call step(): no statistic, no count, no refresh."""
    found = []
    for overflow in (False, True):
        model, optimizer = make()
        optimizer.loss_scale = scaler = torch.amp.GradScaler('cpu', 4.0, growth_interval=1000)
        steps = [(0, 1.0), (9, float('inf')), (1, 1.0)] if overflow else [(0, 1.0), (1, 1.0)]
        for step, factor in steps:
            optimizer.zero_grad()
            scaler.scale(factor * (model(images(step)) ** 2).mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.t == 2
        found.append(curvature(optimizer))
    assert found[0].keys() == found[1].keys()
    assert all(
        torch.allclose(v, found[1][k], rtol=1e-4, atol=1e-6 * float(v.abs().max()))
        for k, v in found[0].items()
    )


def test_nothing_is_merged_before_the_step() -> None:
    model, optimizer = make()
    train(model, optimizer, range(1))
    before = curvature(optimizer)
    optimizer.zero_grad()
    backward(model, step=1)
    assert same(curvature(optimizer), before)
    optimizer.step()
    assert not same(curvature(optimizer), before)


# ------------------------------------------------------------------- 3: hooks of the right kind


def test_full_backward_hooks_are_never_used() -> None:
    for path in Path(mmprecond.__file__).parent.rglob('*.py'):
        assert 'register_full_backward' not in path.read_text(encoding='utf-8'), path


def test_inplace_activations_change_nothing() -> None:
    found = []
    for inplace in (True, False):
        model, optimizer = make()
        model.relu.inplace = inplace
        train(model, optimizer, range(3))
        found.append(curvature(optimizer) | dict(model.named_parameters()))
    assert same(found[0], found[1])


# ------------------------------------------------------------------- 6: exact types


class OwnLinear(nn.Linear):
    pass


class OwnConv(nn.Conv2d):
    pass


@pytest.mark.parametrize('kind', [NKFAC, AdaNKFAC])
def test_other_types_take_the_plain_rule_and_the_table_says_so(
    kind: type[PreconditionedOptimizer],
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        OwnConv(2, 3, 3), nn.Flatten(), OwnLinear(27, 4), nn.LayerNorm(4), nn.Linear(4, 2)
    ).double()
    plain = plain_copy(model)
    optimizer = kind(model, lr=0.1, weight_decay=0.01, settings='published')
    others = list(plain[:4].parameters())
    rule = (
        torch.optim.SGD(others, lr=0.1, momentum=0.9, weight_decay=0.01)
        if kind is NKFAC
        else torch.optim.AdamW(others, lr=0.1, weight_decay=0.1)
    )  # published: 10 x at step 1
    x = torch.randn(4, 2, 5, 5).double()
    for net, stepper in ((model, optimizer), (plain, rule)):
        (net(x) ** 2).mean().backward()
        stepper.step()
    assert [layer.name for layer in optimizer.curvature.layers] == ['4.weight']
    for ours, theirs in zip(model[:4].parameters(), others, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    left_out = {left.name: (left.kind, left.reason) for left in optimizer.curvature.left_out}
    assert {name: kind for name, (kind, _) in left_out.items()} == {
        '0': 'OwnConv',
        '2': 'OwnLinear',
        '3': 'LayerNorm',
    }
    lines = optimizer.table().splitlines()
    for name, (kind_name, reason) in left_out.items():
        assert reason and any(
            line.split()[0] == name and kind_name in line and reason in line for line in lines
        )


@pytest.mark.parametrize(
    'replace',
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.spectral_norm,
    ],
)
def test_a_parametrised_weight_takes_the_plain_rule(replace: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(replace(nn.Linear(3, 3)), nn.Linear(3, 2))
    optimizer = NKFAC(model, lr=0.1, settings='published')
    assert [layer.name for layer in optimizer.curvature.layers] == ['1.weight']
    (model(torch.randn(4, 3)) ** 2).mean().backward()
    optimizer.step()
    assert any(left.name.startswith('0') for left in optimizer.curvature.left_out)


# ------------------------------------------------------------------- copies and evaluation


@pytest.mark.parametrize(
    'duplicate', [copy.deepcopy, lambda model: torch.load(_saved(model), weights_only=False)]
)
def test_a_copy_of_an_armed_model_works_and_is_not_measured(duplicate: Any) -> None:
    model, optimizer = make()
    model.outputs = []
    optimizer.arm()
    assert hooks_of(model)
    twin = duplicate(model)
    backward(twin)
    assert not optimizer.curvature.capture.staged
    assert [p.grad is not None for p in twin.parameters()] == [True] * 6
    backward(model)
    optimizer.step()
    assert set(optimizer.state_dict()['precond']['layers']) == {'conv.weight', 'fc.weight'}
    theirs = NKFAC(twin, lr=0.05, stat_interval=1, refresh_interval=1, settings='published')
    twin.zero_grad()
    backward(twin)
    theirs.step()
    assert same(curvature(theirs), curvature(optimizer))


def test_a_copy_takes_no_curvature_along() -> None:
    """It holds no statistics of its own, and does not keep the optimizer alive."""

    def captures() -> int:
        gc.collect(), gc.collect()  # what earlier tests left may need two
        return sum(type(o) is Capture for o in gc.get_objects())

    model, optimizer = make()
    model.outputs = []
    optimizer.arm()
    assert hooks_of(model)
    before, capture = captures(), weakref.ref(optimizer.curvature.capture)
    twins = copy.deepcopy(model), torch.load(_saved(model), weights_only=False)
    assert captures() == before
    del optimizer, model
    gc.collect()
    assert capture() is None
    for twin in twins:
        backward(twin)


def _saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize('training', [True, False])
def test_forward_passes_without_backward_leave_nothing(context: Any, training: bool) -> None:
    model, optimizer = make()
    model.train(training)
    with context():
        model(images())
    assert not optimizer.curvature.capture.staged
    optimizer.step()
    assert curvature(optimizer) == {}
