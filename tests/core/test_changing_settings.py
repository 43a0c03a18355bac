"""Damping in parameter groups, intervals from a step on, and the first step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.optim.scheduler import LinearParamScheduler
from torch import Tensor, nn

from mmprecond.optimizers import (
    KFAC,
    MAC,
    NKFAC,
    SGDMBK,
    AdamR,
    Preconditioned,
    PreconditionedOptimizer,
)
from tests.support.errors import refused
from tests.support.states import saved


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def train(model: nn.Module, optimizer: PreconditionedOptimizer, steps: range) -> list[int]:
    """Trains on batches by step; returns the steps that captured."""
    captured = []
    for step in steps:
        x = torch.randn(20, 6, generator=torch.Generator().manual_seed(step)).double()
        captured += [step] * bool(optimizer.curvature.due(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return captured


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(first: nn.Module, second: nn.Module) -> bool:
    return all(map(torch.equal, weights(first), weights(second)))


EVERY = dict(stat_interval=1, refresh_interval=1)

# ---------------------------------------------------------------- damping


@pytest.mark.parametrize(('kind', 'damping'), [(NKFAC, 0.01), (KFAC, 0.03), (MAC, 1.0)])
def test_groups_show_the_damping(kind: Any, damping: float) -> None:
    model = net()
    optimizer = kind([{'params': [p]} for p in model.parameters()], lr=0.1, model=model)
    assert {group['damping'] for group in optimizer.param_groups} == {damping}
    assert 'damping' not in AdamR(net(), lr=0.1).param_groups[0]  # it has none


@pytest.mark.parametrize('kind', [NKFAC, KFAC])
def test_a_changed_damping_acts_at_the_next_refresh(kind: Any) -> None:
    changed, fixed, other = net(), net(), net()
    optimizer = kind(changed, lr=0.1, **EVERY)
    optimizer.param_groups[0]['damping'] = 0.5
    train(changed, optimizer, range(3))
    train(fixed, kind(fixed, lr=0.1, damping=0.5, **EVERY), range(3))
    train(other, kind(other, lr=0.1, **EVERY), range(3))
    for a, b, c in zip(weights(changed), weights(fixed), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(a, c, rtol=1e-4)


def test_methods_of_one_group_keep_their_ratios() -> None:
    model = net()
    layers = [
        dict(match=dict(name='0'), preconditioner=dict(type='NKFAC', damping=0.01)),
        dict(preconditioner=dict(type='NKFAC', damping=0.04)),
    ]
    rule = dict(type='SGDM', lr=0.1)
    optimizer = Preconditioned(model, rule=rule, layers=layers)
    optimizer.param_groups[0]['damping'] *= 10
    found = optimizer.curvature.dampings.current(optimizer.param_groups)
    assert {layer.name: round(damping, 12) for layer, damping in found.items()} == {
        '0.weight': 0.1,
        '2.weight': 0.4,
    }


def test_a_scheduler_of_mmengine_changes_the_damping() -> None:
    model = net()
    cfg = dict(
        constructor='PrecondOptimWrapperConstructor',
        optimizer=dict(type='NKFAC', lr=0.1, **EVERY),
        paramwise_cfg=dict(bias_decay_mult=0.0, custom_keys={'2': dict(damping=0.2)}),
    )
    wrapper = build_optim_wrapper(model, cfg)
    scheduler = LinearParamScheduler(wrapper, 'damping', start_factor=0.1, end_factor=1.0, end=4)
    seen = []
    for step in range(5):
        train(model, wrapper.optimizer, range(step, step + 1))
        seen.append(wrapper.optimizer.param_groups[0]['damping'])
        scheduler.step()
    assert seen == pytest.approx([0.001, 0.004, 0.007, 0.01, 0.01])
    assert {round(g['damping'], 12) for g in wrapper.optimizer.param_groups} == {0.01, 0.2}


def test_a_changed_damping_is_resumed_and_an_unchanged_one_is_not() -> None:
    model = net()
    optimizer = NKFAC(model, lr=0.1, **EVERY)
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    other = NKFAC(copy.deepcopy(model), lr=0.1, damping=0.3, **EVERY)
    other.load_state_dict(saved)
    assert other.param_groups[0]['damping'] == 0.3  # what the new run asks for

    optimizer.param_groups[0]['damping'] = 0.05
    saved = copy.deepcopy(optimizer.state_dict())
    twin = copy.deepcopy(model)
    resumed = NKFAC(twin, lr=0.1, **EVERY)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]['damping'] == 0.05
    train(model, optimizer, range(2, 5))
    train(twin, resumed, range(2, 5))
    assert equal(model, twin)

    for group in saved['param_groups']:  # as older versions saved them
        del group['damping'], group['initial_damping']
    old = NKFAC(net(), lr=0.1, damping=0.3)
    old.load_state_dict(saved)
    assert old.param_groups[0]['damping'] == old.param_groups[0]['initial_damping'] == 0.3


def test_added_groups_have_the_entry_too() -> None:
    model = net()
    optimizer = NKFAC(model[0].parameters(), lr=0.1, model=model)
    optimizer.add_param_group({'params': list(model[2].parameters())})
    assert [group['damping'] for group in optimizer.param_groups] == [0.01, 0.01]


def test_a_damping_of_a_group_is_one_that_the_method_takes() -> None:
    """AdaBK's 'lowrank' has a bound, which a group and a scheduler cannot pass."""
    model = net()
    settings: dict[str, Any] = dict(lr=0.1, solver='lowrank', damping=1e-2, **EVERY)
    group = dict(params=model.parameters(), damping=1e-6)
    refused(ValueError, lambda: SGDMBK([group], model=model, **settings), 'damping=1e-06')
    optimizer = SGDMBK(model, **settings)
    train(model, optimizer, range(2))
    optimizer.param_groups[0]['damping'] = 1e-7
    refused(ValueError, lambda: train(model, optimizer, range(2, 3)), 'damping=1e-07')


def test_a_damping_without_effect_is_refused() -> None:
    model = net()
    group = dict(params=model.parameters(), damping=0.5)
    refused(ValueError, lambda: AdamR([group], lr=0.1, model=model), 'AdamR does not take')


def test_a_state_with_added_groups_loads() -> None:
    model = net()
    optimizer = NKFAC(model[0].parameters(), lr=0.1, model=model)
    optimizer.add_param_group({'params': list(model[2].parameters())})
    train(model, optimizer, range(2))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group['damping'] for group in optimizer.param_groups] == [0.01, 0.01]


@pytest.mark.parametrize('wrong', ['False', 'SOAP', None, 0])
def test_precondition_of_a_group_is_a_flag(wrong: Any) -> None:
    model = net()
    group = dict(params=model.parameters(), precondition=wrong)
    refused(ValueError, lambda: NKFAC([group], lr=0.1, model=model), 'neither True nor False')


# ---------------------------------------------------------------- intervals


def test_intervals_change_at_their_steps() -> None:
    model = net()
    settings = dict(stat_interval=1, refresh_interval=1, early_refreshes=False)
    optimizer = NKFAC(model, lr=0.01, intervals=[(3, 2, 4), (10, 5, 5)], **settings)
    assert train(model, optimizer, range(21)) == [0, 1, 2, 4, 6, 8, 10, 15, 20]
    assert 'captures every 5 steps, refreshes every 5' in repr(optimizer)


def test_changing_intervals_resume_to_the_bit() -> None:
    def build(model: nn.Module) -> NKFAC:
        return NKFAC(model, lr=0.01, intervals=[(0, 2, 2), (6, 3, 6)], early_refreshes=False)

    whole, part = net(), net()
    train(whole, build(whole), range(14))
    first = build(part)
    train(part, first, range(7))
    second = build(part)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert train(part, second, range(7, 14)) == [9, 12]
    assert equal(whole, part)


def test_a_rollback_undoes_the_plan() -> None:
    """A state of before the planned step takes the intervals of before with it."""
    settings: dict[str, Any] = dict(intervals=[(10, 5, 25)], stat_interval=2, refresh_interval=4)
    models = net(), net()
    first = NKFAC(models[0], lr=0.01, **settings)
    train(models[0], first, range(6))
    saved, before = copy.deepcopy(first.state_dict()), copy.deepcopy(models[0].state_dict())
    train(models[0], first, range(6, 12))
    models[0].load_state_dict(before)
    models[1].load_state_dict(before)
    fresh = NKFAC(models[1], lr=0.01, **settings)
    for model, optimizer in zip(models, (first, fresh), strict=True):
        optimizer.load_state_dict(copy.deepcopy(saved))
        train(model, optimizer, range(6, 14))
    assert equal(*models)


@pytest.mark.parametrize(
    'plan',
    [
        [(0, 2, 3)],
        [(0, 2)],
        [(5, 1, 1), (5, 2, 2)],
        [(0, 0, 1)],
        [(0.5, 1, 1)],
        [5],
        5,
        None,
        (0, 5, 25),
    ],
    ids=str,
)
def test_bad_intervals_are_refused(plan: Any) -> None:
    with pytest.raises(ValueError, match='give entries .step, stat_interval, refresh_interval.'):
        NKFAC(net(), lr=0.1, intervals=plan)


def test_intervals_and_overhead_exclude_each_other() -> None:
    with pytest.raises(ValueError, match='leave it or intervals out'):
        NKFAC(net(), lr=0.1, intervals=[(0, 1, 1)], overhead=0.1)


# ---------------------------------------------------------------- start_step


@pytest.mark.parametrize('stagger', [False, True])
def test_nothing_is_measured_before_the_start(stagger: bool) -> None:
    model = net()
    settings = dict(stat_interval=2, refresh_interval=4, early_refreshes=False, stagger=stagger)
    optimizer = NKFAC(model, lr=0.01, start_step=5, **settings)
    assert train(model, optimizer, range(5)) == []
    captured = train(model, optimizer, range(5, 12))
    assert captured[0] == 5 and (stagger or captured == [5, 7, 9, 11])


def test_the_start_is_that_of_torch() -> None:
    model, other = net(), net()
    train(model, NKFAC(model, lr=0.01, momentum=0.9, start_step=100), range(4))
    sgd = torch.optim.SGD(other.parameters(), lr=0.01, momentum=0.9)
    for step in range(4):
        x = torch.randn(20, 6, generator=torch.Generator().manual_seed(step)).double()
        sgd.zero_grad()
        other(x).square().mean().backward()
        sgd.step()
    for a, b in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_a_search_begins_at_the_start() -> None:
    model = net()
    optimizer = NKFAC(model, lr=0.001, start_step=10, overhead=0.5)
    train(model, optimizer, range(10))
    assert optimizer.curvature.state_dict(10).get('overhead') is None
    assert train(model, optimizer, range(10, 110))[0] == 10
    assert optimizer.curvature.state_dict(110)['overhead']['share'] == 0.5


def test_a_start_must_be_a_step() -> None:
    with pytest.raises(ValueError, match='start_step=-1 is out of range; give an integer of at l'):
        NKFAC(net(), lr=0.1, start_step=-1)


# ---------------------------------------------------------------- what is said


def test_print_shows_the_plan() -> None:
    text = repr(NKFAC(net(), lr=0.1, start_step=5, intervals=[(8, 2, 4)]))
    assert 'nothing is captured before step 5' in text
    assert 'from step 8 on: captures every 2 steps, refreshes every 4' in text


@pytest.mark.parametrize('damping', [-1.0, 'a', float('nan')])
def test_a_damping_by_hand_is_checked(damping: Any) -> None:
    model = net()
    optimizer = NKFAC(model, lr=0.1, **EVERY)
    optimizer.param_groups[0]['damping'] = damping
    with pytest.raises(ValueError, match='damping of the group of 0.weight=.* is out of range'):
        train(model, optimizer, range(1))


def test_misspelt_entries_of_groups_are_refused() -> None:
    model = net()
    with pytest.raises(ValueError, match='a parameter group has dampng; did you mean damping'):
        NKFAC([dict(params=list(model.parameters()), dampng=0.5)], lr=0.1, model=model)


@pytest.mark.parametrize('entry', [dict(stat_interval=5), dict(clip_update=1.0)])
def test_entries_of_groups_that_are_common_to_all_are_refused(entry: dict[str, Any]) -> None:
    model = net()
    with pytest.raises(ValueError, match='has (stat_interval|clip_update), which all groups have'):
        NKFAC([dict(params=list(model.parameters()), **entry)], lr=0.1, model=model)


def test_settings_of_a_method_are_sent_there() -> None:
    from mmprecond import precondition

    model = net()
    with pytest.raises(TypeError, match=r"elsewhere=dict\(type='NKFAC', damping=0.1\)"):
        precondition(model, torch.optim.SGD(model.parameters(), lr=0.1), 'NKFAC', damping=0.1)


def test_the_scheduler_of_the_docs_works() -> None:
    model = net()
    optimizer = NKFAC(model, lr=0.1, damping=0.1)
    scheduler = LinearParamScheduler(
        optimizer, 'damping', start_factor=1.0, end_factor=0.1, begin=0, end=1000, by_epoch=False
    )
    for _ in range(1000):
        scheduler.step()
    assert optimizer.param_groups[0]['damping'] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ('plan', 'expected'),
    [
        (dict(start_step=4), [8, 10, 12, 14]),
        (dict(start_step=10), [10, 12, 14]),
        (dict(intervals=[(6, 3, 3)]), [8, 11, 14]),
        (dict(intervals=[(11, 4, 4)]), [8, 10, 12]),
    ],
    ids=str,
)
def test_a_run_without_saved_curvature_goes_on_at_its_step(
    plan: dict[str, Any], expected: list[int]
) -> None:
    """It measures at once, or at the given start, and its plan is not gone through again."""
    settings = dict(lr=0.1, stat_interval=2, refresh_interval=2, early_refreshes=False, **plan)
    model = net()
    optimizer = NKFAC(model, **settings, save_curvature=False)
    train(model, optimizer, range(8))
    twin = copy.deepcopy(model)
    resumed = NKFAC(twin, **settings)
    resumed.load_state_dict(saved(optimizer.state_dict()))
    assert resumed.t == 8
    assert train(twin, resumed, range(8, 13)) == [step for step in expected if step < 13]
    again = NKFAC(copy.deepcopy(twin), **settings)
    again.load_state_dict(saved(resumed.state_dict()))  # which measures at other steps than planned
    assert [step for step in range(13, 15) if again.curvature.due(step)] == [
        step for step in expected if step >= 13
    ]
    resumed.load_state_dict(NKFAC(net(), **settings).state_dict())
    assert resumed.curvature.schedule.state_dict() == {}  # a start of before is forgotten
