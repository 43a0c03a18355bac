"""Checkpoints of another assignment of methods to layers."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from mmprecond.optimizers import (
    NKFAC,
    SGDPH,
    DCTAdamW,
    FAdam,
    Preconditioned,
    RuleOptimizer,
)
from tests.support.errors import refused, warnings_of
from tests.support.mixed import (
    ALL,
    ATTENTION,
    FEATURE,
    KRONECKER,
    MIXED,
    NAMES,
    RULE,
    build,
    curvature,
    entry,
    methods,
    net,
    run,
)
from tests.support.states import differences, everything, saved

pytestmark = pytest.mark.usefixtures('window_attention_is_known')

#: What MIXED had: FEATURE on blocks.*, ATTENTION on blocks.0.attn, KRONECKER on patch alone.
CHANGES: dict[str, tuple[list[dict[str, Any]], set[str], set[str]]] = {
    'another method': (
        [entry(KRONECKER, module_type='FFN'), *MIXED],
        {f'blocks.{k}.ffn.{part}' for k in (0, 1) for part in ('up', 'down')},
        set(),
    ),
    'one layer': ([MIXED[0], entry(FEATURE, name='patch'), *MIXED[1:3]], {'patch'}, set()),
    'no attention': (
        [entry(None, name='head'), entry(FEATURE, name='blocks.*'), *ALL],
        {'blocks.0.attn.qkv', 'blocks.0.attn.proj'},
        set(),
    ),
    'attention': (
        [MIXED[0], entry(ATTENTION, module_type='WindowMSA'), *MIXED[2:]],
        {'blocks.1.attn.qkv', 'blocks.1.attn.proj'},
        set(),
    ),
    'another variant': (
        [
            MIXED[0],
            entry(
                dict(ATTENTION, variant='gauss_newton'), module_type='WindowMSA', name='blocks.0'
            ),
            *MIXED[2:],
        ],
        {'blocks.0.attn.qkv'},
        set(),
    ),
    'one more': (MIXED[1:], set(), {'head'}),
    'one less': ([entry(None, name='blocks.1'), *MIXED], set(), set()),
    'other intervals': ([*MIXED[:3], entry(dict(KRONECKER, stat_interval=2))], set(), set()),
    'another order': ([MIXED[3] | dict(match=dict(name='patch')), *MIXED[:3]], set(), set()),
}


@pytest.mark.parametrize('name', CHANGES)
def test_a_checkpoint_of_another_assignment(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Layers whose method changed start anew, after one warning; the others go on."""
    layers, changed, added = CHANGES[name]
    model = net()
    optimizer = build(MIXED, model=model)
    run(model, optimizer, range(5))
    before = curvature(optimizer)
    twin = copy.deepcopy(model)
    resumed = build(layers, model=twin)
    assert {k for k, v in methods(resumed).items() if v != methods(optimizer).get(k)} >= added
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        resumed.load_state_dict(saved(optimizer.state_dict()))
    told = warnings_of(caplog)
    assert len(told) == bool(changed)
    for message in told:
        assert '\n' not in message and 'measured anew' in message
        named = sum(f'{layer}.weight' in message for layer in NAMES)
        assert named == min(3, len(changed)) == sum(f'{c}.weight' in message for c in changed)
        assert len(changed) <= 3 or f'and {len(changed) - 3} more' in message
    assert resumed.t == 5
    now = curvature(resumed)
    kept = {f'{layer}.weight' for layer in set(methods(resumed)) - changed - added}
    assert set(now) == kept
    assert differences(now, {layer: before[layer] for layer in now}) == []
    run(twin, resumed, range(5, 10))
    after = curvature(resumed)
    assert set(after) == {f'{layer}.weight' for layer in methods(resumed)}
    for layer, state in after.items():
        assert state['method'] == methods(resumed)[layer.removesuffix('.weight')]
        stack = next(s for x, s in resumed.curvature.layers.items() if x.name == layer).method
        captures = [t for t in range(5, 10) if t % stack.stat_interval == 0]
        renewals = {t for t in captures if t % stack.refresh_interval == 0}
        if layer not in kept:  # what does not fit is measured at once, and refreshed at once
            first = 5 if layer.removesuffix('.weight') in changed else captures[0]
            assert state['refreshes'] == len(renewals | {first}), layer
        else:
            assert state['refreshes'] == before[layer]['refreshes'] + len(renewals), layer


def test_the_same_assignment_in_other_words_goes_on_bit_for_bit() -> None:
    model = net()
    optimizer = build(MIXED, model=model)
    run(model, optimizer, range(5))
    twin = copy.deepcopy(model)
    resumed = build(CHANGES['another order'][0], model=twin)
    assert methods(resumed) == methods(optimizer)
    resumed.load_state_dict(saved(optimizer.state_dict()))
    run(model, optimizer, range(5, 10)), run(twin, resumed, range(5, 10))
    ours, theirs = everything(model, optimizer), everything(twin, resumed)
    assert differences(ours['model'], theirs['model']) == []


def test_all_methods_changed_starts_anew_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """No layer has an operator: the schedule starts over, and the moments stay."""
    model = net()
    optimizer = build([entry(FEATURE)], model=model)
    run(model, optimizer, range(5))
    twin = copy.deepcopy(model)
    resumed = build([entry(dict(KRONECKER, stat_interval=50, refresh_interval=50))], model=twin)
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        resumed.load_state_dict(saved(optimizer.state_dict()))
    assert len(warnings_of(caplog)) == 1 and resumed.t == 5
    assert {state['step'] for state in resumed.state.values()} == {5}
    run(twin, resumed, range(5, 6))
    assert all(state['refreshes'] == 1 for state in curvature(resumed).values())
    assert len(curvature(resumed)) == len(NAMES)


def test_a_layer_is_known_by_all_its_names() -> None:
    model = net()
    model.alias = model.head
    optimizer = Preconditioned(
        model, rule=RULE, layers=[entry(None, name='alias'), entry(KRONECKER)]
    )
    assert 'head.weight' not in {layer.name for layer in optimizer.curvature.layers}


@pytest.mark.parametrize('saved, loaded', [('AdamW', 'Adan'), ('SGDM', 'AdamW'), ('Adan', 'SGDM')])
def test_a_state_of_another_rule_is_refused(saved: str, loaded: str) -> None:
    first, second = (
        Preconditioned(net(), rule=dict(type=kind, lr=0.1), layers=[entry(KRONECKER)])
        for kind in (saved, loaded)
    )
    before = second.state_dict()
    refused(ValueError, lambda: second.load_state_dict(first.state_dict()), 'another rule')
    assert second.state_dict().keys() == before.keys()


def trained(kind: type[RuleOptimizer], features: int, **settings: Any) -> RuleOptimizer:
    """An optimizer after one step of a small model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, features), nn.Linear(features, 2))
    optimizer = kind(model, lr=0.01, **settings)
    model(torch.randn(5, 4)).square().sum().backward(create_graph=kind is SGDPH)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize('kind', [FAdam, NKFAC, SGDPH])
def test_a_state_of_another_model_of_as_many_parameters_is_refused(
    kind: type[RuleOptimizer],
) -> None:
    """Its moments would fail in the next step, or be broadcast."""
    settings = {} if kind is SGDPH else dict(early_refreshes=False)
    optimizer, other = (trained(kind, features, **settings) for features in (3, 1))
    before = copy.deepcopy(optimizer.state_dict())
    refused(
        ValueError,
        lambda: optimizer.load_state_dict(saved(other.state_dict())),
        'has shape (1, 4)',
        'another model',
    )
    assert differences(optimizer.state_dict(), before) == []


def test_a_state_of_rotated_moments_is_refused() -> None:
    """DCTAdamW has AdamW's hyper-parameters, and moments of projections under the same names."""
    rotated = saved(trained(DCTAdamW, 6, rank=2).state_dict())
    optimizer = trained(FAdam, 6)
    refused(ValueError, lambda: optimizer.load_state_dict(rotated), 'another rule')
