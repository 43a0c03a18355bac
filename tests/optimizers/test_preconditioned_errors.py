"""`Preconditioned`: wrong arguments, and checkpoints of another assignment."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from mmprecond.optimizers import Preconditioned, PreconditionedOptimizer
from mmprecond.preconditioners import METHODS, InputFeature
from tests.support.errors import refused, warnings_of
from tests.support.mixed import (
    ATTENTION,
    FEATURE,
    KRONECKER,
    MIXED,
    NAMES,
    RULE,
    curvature,
    entry,
    methods,
    net,
    run,
)
from tests.support.states import differences, everything, saved

ALL = [entry(KRONECKER)]

pytestmark = pytest.mark.usefixtures('window_attention_is_known')


def build(
    layers: Any = ALL, rule: Any = RULE, model: nn.Module | None = None, **more: Any
) -> PreconditionedOptimizer:
    return Preconditioned(net() if model is None else model, rule=rule, layers=layers, **more)


# ------------------------------------------------------------------- layers

NAMES_OF_METHODS = ', '.join(sorted(METHODS))
EXAMPLE = "preconditioner=dict(type='NewtonKronecker')"
WRONG: dict[str, tuple[Any, list[str]]] = {
    'missing': (None, ['layers=None', 'write layers=[', EXAMPLE]),
    'empty': ([], ['layers=[]', 'write layers=[', EXAMPLE]),
    'a dict': (entry(KRONECKER), ['layers=', 'write layers=[', EXAMPLE]),
    'a string': ('NewtonKronecker', ['layers=', 'write layers=[', EXAMPLE]),
    'a name in the list': (['NewtonKronecker'], ['layers[0]', EXAMPLE, 'preconditioner=None']),
    'no preconditioner': ([*ALL, dict(match=dict(name='head'))], ['layers[1]', EXAMPLE]),
    'an unknown key': (
        [dict(where='head', **entry(KRONECKER))],
        ['layers[0]', 'where', 'it takes match, preconditioner'],
    ),
    'unknown method': ([entry(dict(type='KFACK'))], ["'KFACK'", NAMES_OF_METHODS]),
    'an optimizer for a method': ([entry(dict(type='NKFAC'))], ["'NKFAC'", NAMES_OF_METHODS]),
    'another class': ([entry(dict(type=nn.Linear))], ['layers[0]', NAMES_OF_METHODS]),
    'a list for a method': ([entry(dict(type=['InputFeature']))], [NAMES_OF_METHODS]),
    'no type': ([entry(dict(damping=0.1))], ['has no type', NAMES_OF_METHODS]),
    'a bare name': ([entry('InputFeature')], ["'InputFeature'", 'type=', NAMES_OF_METHODS]),
    'unknown setting': (
        [entry(dict(KRONECKER, dampnig=0.1))],
        ['layers[0]', 'NewtonKronecker', 'dampnig', 'it takes', 'damping'],
    ),
    'setting of another': (
        [entry(dict(FEATURE, newton_steps=2))],
        ['InputFeature', 'newton_steps', 'exponent'],
    ),
    'lr in a method': ([entry(dict(KRONECKER, lr=0.1))], ['NewtonKronecker', 'lr']),
    'bad value': (
        [entry(KRONECKER, name='head'), entry(dict(FEATURE, damping=-1.0))],
        ['layers[1]', 'damping=-1.0', 'greater than 0'],
    ),
    'bad intervals': (
        [entry(dict(FEATURE, refresh_interval=5))],
        ['refresh_interval=5', 'multiple', 'stat_interval=2'],
    ),
    'bad choice': ([entry(dict(KRONECKER, solver='lu'))], ['solver', 'newton, cholesky']),
    'bad variant': ([entry(dict(ATTENTION, variant='exact'))], ['thesis, gauss_newton']),
    'hits nothing by type': (
        [entry(KRONECKER, module_type='SwinBlock'), *ALL],
        ['layers[0]', 'SwinBlock', 'hits nothing', 'Net', 'WindowMSA'],
    ),
    'hits nothing by name': (
        [*MIXED, entry(FEATURE, name='backbone.*')],
        ['layers[4]', 'backbone.*', 'hits nothing', 'blocks', 'patch'],
    ),
    'hits nothing by both': (
        [entry(KRONECKER, module_type='Conv2d', name='blocks'), *ALL],
        ['Conv2d', 'blocks', 'hits nothing'],
    ),
    'none hits nothing': ([entry(None, name='bbox_head'), *ALL], ['bbox_head', 'hits nothing']),
    'all are taken': (
        [entry(KRONECKER, name='blocks.*'), entry(FEATURE, module_type='FFN')],
        ['layers[1]', 'FFN', 'taken', 'put it first'],
    ),
    'all are taken by the rest': ([*ALL, entry(FEATURE, name='head')], ['layers[1]', 'first']),
    'all are taken by two': (
        [
            entry(KRONECKER, name='*.up'),
            entry(None, name='*.down'),
            entry(FEATURE, module_type='FFN'),
        ],
        ['layers[2]', 'put it first'],
    ),
    'no layer in it': (
        [entry(KRONECKER, module_type='LayerNorm'), *ALL],
        ['layers[0]', 'LayerNorm', 'no layer that can be preconditioned'],
    ),
    'unknown match key': (
        [entry(KRONECKER, type='FFN')],
        ['layers[0]', 'type', 'it takes module_type, name'],
    ),
    'a name for a match': (
        [dict(match='head', preconditioner=KRONECKER)],
        ["match='head'", "write match=dict(name='backbone.*')"],
    ),
    'a list for a name': ([entry(KRONECKER, name=['head'])], ["name=['head']", 'write name=']),
    'no types': ([entry(KRONECKER, module_type=[])], ['module_type=[]', 'write module_type=']),
    'a number in the types': (
        [entry(KRONECKER, module_type=['FFN', 1])],
        ['module_type', 'write module_type='],
    ),
}


@pytest.mark.parametrize('name', WRONG)
def test_wrong_layers(name: str) -> None:
    layers, fragments = WRONG[name]
    refused(ValueError, lambda: build(layers), *fragments)


@pytest.mark.parametrize('kind', [nn.Linear, 5], ids=['a class', 'a number'])
def test_module_type_is_neither_name_nor_list(kind: Any) -> None:
    refused(
        ValueError,
        lambda: build([entry(KRONECKER, module_type=kind)]),
        'layers[0]',
        'module_type',
        "write module_type='WindowMSA'",
    )


@pytest.mark.parametrize('match', [[], ''], ids=repr)
def test_match_is_no_dict(match: Any) -> None:
    refused(
        ValueError,
        lambda: build([dict(match=match, preconditioner=KRONECKER)]),
        'layers[0]',
        'match=',
        'write match=dict(',
    )


@pytest.mark.parametrize(
    'layers',
    [[*ALL, entry(None, name='head')], [*ALL, entry(FEATURE)], [*ALL, entry(None)]],
    ids=['none', 'twice', 'twice, none'],
)
def test_an_entry_that_no_layer_reaches(layers: Any) -> None:
    """The user of the first thinks that the head is left to the rule."""
    refused(ValueError, lambda: build(layers), 'layers[1]', 'put it first')


def test_the_rest_may_be_nothing() -> None:
    """The same list serves models with and without other layers."""
    optimizer = build(
        [entry(KRONECKER, name='*.*'), entry(KRONECKER, module_type='Net'), entry(FEATURE)]
    )
    assert set(methods(optimizer).values()) == {'NewtonKronecker'}


@pytest.mark.parametrize(
    'layers, why',
    [
        ([entry(None)], 'preconditioner=None'),
        ([entry(dict(KRONECKER, max_dim=2))], 'max_dim=2'),
        ([entry(None, name='*')], 'preconditioner=None'),
    ],
    ids=['None', 'max_dim', 'None by name'],
)
def test_a_list_that_preconditions_nothing(layers: Any, why: str) -> None:
    refused(ValueError, lambda: build(layers), 'no layer to precondition', 'Preconditioned', why)


def test_a_layer_that_its_group_excludes_is_no_layer_to_match() -> None:
    model = net()
    groups = [
        dict(params=[p], precondition=not name.startswith('head'))
        for name, p in model.named_parameters()
    ]
    refused(
        ValueError,
        lambda: Preconditioned(
            groups, model=model, rule=RULE, layers=[entry(FEATURE, name='head'), *ALL]
        ),
        'layers[0]',
        'no layer that can be preconditioned',
    )


# ------------------------------------------------------------------- rule and the rest

CHOICES = 'SGDM, EMASGD, AdamW, Adan, ARO, DCTAdamW'
RULES: dict[str, tuple[Any, list[str]]] = {
    'missing': (None, ['rule=None', 'write rule=dict(type=..., lr=...)', CHOICES]),
    'a name': ('AdamW', ["rule='AdamW'", 'write rule=dict(type=..., lr=...)']),
    'no type': (dict(lr=0.1), ['has no type', 'write rule=dict(type=..., lr=...)']),
    'no lr': (dict(type='SGDM'), ['no lr', "write rule=dict(type='SGDM', lr=...)"]),
    'unknown': (dict(type='Adam', lr=0.1), ["'Adam'", CHOICES]),
    'a class': (dict(type=torch.optim.AdamW, lr=0.1), ['AdamW', CHOICES]),
    'unknown setting': (
        dict(type='SGDM', lr=0.1, betas=(0.9, 0.99)),
        ['SGDM', 'betas', 'it takes lr, momentum, weight_decay'],
    ),
    'decay of SGDM': (dict(type='SGDM', lr=0.1, decay='published'), ['SGDM', 'decay']),
    'bad decay': (dict(RULE, decay='L2'), ["decay='L2'", 'decoupled, published']),
    'bad lr': (dict(RULE, lr=-1.0), ['lr=-1.0', 'at least 0']),
    'lr is None': (dict(RULE, lr=None), ['lr=None', 'give a number']),
    'lr in words': (dict(RULE, lr='1e-4'), ["lr='1e-4'", 'give a number']),
    'bad momentum': (dict(type='SGDM', lr=0.1, momentum=1.0), ['momentum=1.0', 'less than 1']),
    'bad weight decay': (dict(RULE, weight_decay=None), ['weight_decay=None', 'give a number']),
}


@pytest.mark.parametrize('name', RULES)
def test_wrong_rules(name: str) -> None:
    rule, fragments = RULES[name]
    refused(ValueError, lambda: build(rule=rule), *fragments)


@pytest.mark.parametrize(
    'keys',
    [
        dict(lr=0.1),
        dict(momentum=0.9),
        dict(betas=(0.9, 0.99)),
        dict(lr=0.1, weight_decay=0.0, momentum=0.9),
        dict(damping=0.1),
    ],
)
def test_left_over_keys_say_delete(keys: dict[str, Any]) -> None:
    refused(
        TypeError,
        lambda: build(**keys),
        'Preconditioned',
        *keys,
        '`_delete_=True`',
        'rule',
        'layers',
    )


def test_a_missing_model() -> None:
    refused(
        ValueError,
        lambda: Preconditioned(net().parameters(), rule=RULE, layers=ALL),
        'Preconditioned',
        'model=',
        "constructor='PrecondOptimWrapperConstructor'",
    )


def test_nothing_wrong_leaves_hooks_on_the_model() -> None:
    model = net()
    for wrong in (
        dict(rule=dict(RULE, lr=-1.0)),
        dict(layers=WRONG['all are taken'][0]),
        dict(layers=WRONG['hits nothing by name'][0]),
        dict(capture_mb=-1),
    ):
        with pytest.raises(ValueError):
            build(model=model, **wrong)
    assert not any(m._forward_hooks for m in model.modules())


@dataclass(frozen=True, kw_only=True)
class OnlySGDM(InputFeature):
    rules: ClassVar[tuple[str, ...]] = ('SGDM',)


@dataclass(frozen=True, kw_only=True)
class OnlyAdam(InputFeature):
    rules: ClassVar[tuple[str, ...]] = ('AdamW', 'Adan')


SGDM = dict(type='SGDM', lr=0.1)


def test_a_method_that_does_not_work_with_the_rule() -> None:
    bound = [entry(dict(type=OnlySGDM), name='head'), *ALL]
    refused(ValueError, lambda: build(bound), 'OnlySGDM', 'AdamW', "write rule=dict(type='SGDM'")
    refused(
        ValueError,
        lambda: build([entry(dict(type=OnlyAdam))], SGDM),
        'OnlyAdam',
        'SGDM',
        "write rule=dict(type='Ad",
    )
    for layers, rule in (
        (bound, SGDM),
        ([entry(dict(type=OnlyAdam))], RULE),
        ([entry(dict(type=OnlyAdam))], dict(type='Adan', lr=0.1)),
    ):
        assert methods(build(layers, rule))


@pytest.mark.parametrize('rule', [RULE, SGDM], ids=lambda rule: rule['type'])
def test_methods_that_need_different_rules(rule: dict[str, Any]) -> None:
    layers = [entry(dict(type=OnlySGDM), name='head'), entry(dict(type=OnlyAdam))]
    refused(ValueError, lambda: build(layers, rule), 'OnlySGDM', 'OnlyAdam', 'drop one')


def test_a_method_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its class, or by name once it is in METHODS."""
    monkeypatch.setitem(METHODS, 'OnlyAdam', OnlyAdam)
    for kind in (OnlyAdam, 'OnlyAdam'):
        model = net()
        optimizer = build([entry(dict(FEATURE, type=kind))], model=model)
        assert set(methods(optimizer).values()) == {'OnlyAdam'}
        run(model, optimizer, range(2))
        assert {state['method'] for state in curvature(optimizer).values()} == {'OnlyAdam'}


# ------------------------------------------------------------------- another assignment

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
    assert len(warnings_of(caplog)) == 1 and resumed.t == 0
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
