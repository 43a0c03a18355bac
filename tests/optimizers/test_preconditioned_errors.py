"""`Preconditioned`: wrong arguments, and checkpoints of another assignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from mmprecond.optimizers import Preconditioned
from mmprecond.preconditioners import METHODS, InputFeature
from tests.support.errors import refused
from tests.support.mixed import (
    ALL,
    ATTENTION,
    FEATURE,
    KRONECKER,
    MIXED,
    RULE,
    build,
    curvature,
    entry,
    methods,
    net,
    run,
)

pytestmark = pytest.mark.usefixtures('window_attention_is_known')


# ------------------------------------------------------------------- layers

NAMES_OF_METHODS = ', '.join(sorted(METHODS))
EXAMPLE = "preconditioner=dict(type='NewtonKronecker')"
WRONG: dict[str, tuple[Any, list[str]]] = {
    'missing': (None, ['layers=None', "write 'NKFAC' for all", EXAMPLE]),
    'empty': ([], ['layers=[]', "write 'NKFAC' for all", EXAMPLE]),
    'a dict': (entry(KRONECKER), ['layers does not take preconditioner', 'attention, elsewhere']),
    'a name in the list': (['NewtonKronecker'], ['layers[0]', EXAMPLE, 'preconditioner=None']),
    'no preconditioner': ([*ALL, dict(match=dict(name='head'))], ['layers[1]', EXAMPLE]),
    'an unknown key': (
        [dict(where='head', **entry(KRONECKER))],
        ['layers[0]', 'where', 'it takes match, preconditioner'],
    ),
    'unknown method': ([entry(dict(type='KFACK'))], ["'KFACK'", NAMES_OF_METHODS]),
    'an optimizer for a method': ([entry(dict(type='AdamW'))], ["'AdamW'", NAMES_OF_METHODS]),
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

CHOICES = 'SGDM, EMASGD, AdamW, Adan, AdaGrad, RAdam, AdaBelief, ARO, DCTAdamW, RAMDA'
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
