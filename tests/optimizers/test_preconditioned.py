"""`Preconditioned`: equal to the named optimizers, layers by an ordered list, mixed methods."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

import mmprecond.optimizers
from mmprecond.optimizers import Preconditioned, PreconditionedOptimizer
from tests.support.errors import warnings_of
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

# ------------------------------------------------------------------- the named optimizers

SMALL = dict(stat_interval=1, refresh_interval=2)
SGDM = dict(type='SGDM', lr=0.02, momentum=0.8, weight_decay=0.1)
ADAMW = dict(type='AdamW', lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
ADAN = dict(type='Adan', lr=0.01, betas=(0.9, 0.8, 0.95), weight_decay=0.1)
RADAM = dict(ADAMW, type='RAdam')
PUBLISHED = dict(ADAMW, decay='published')

#: Optimizer, what its rule's arguments lack, rule, preconditioner, settings of both.
PAIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str, dict[str, Any]]] = {
    'NKFAC': ('NKFAC', {}, SGDM, 'NewtonKronecker', dict(damping=0.1, newton_steps=2)),
    'AdaNKFAC': ('AdaNKFAC', {}, PUBLISHED, 'NewtonKronecker', dict(solver='cholesky')),
    'FSGD': ('FSGD', {}, SGDM, 'InputFeature', dict(exponent=0.5)),
    'FAdam': ('FAdam', {}, ADAMW, 'InputFeature', dict(norm_recovery=False)),
    'AFOpt': ('AFOpt', {}, SGDM, 'AttentionFeature', {}),
    'AdaAFOpt': ('AdaAFOpt', {}, ADAMW, 'AttentionFeature', dict(variant='gauss_newton')),
    **{
        f'{name}, {rule["type"]}': (name, dict(rule=rule['type']), rule, method, {})
        for name, method in (('AdaNKFAC', 'NewtonKronecker'), ('AdamWBK', 'KroneckerRoot'))
        for rule in (ADAN, RADAM)
    },
    'AdaAFOpt, Adan': ('AdaAFOpt', dict(rule='Adan'), ADAN, 'AttentionFeature', {}),
}

pytestmark = pytest.mark.usefixtures('window_attention_is_known')


def pair(name: str, settings: dict[str, Any]) -> list[tuple[nn.Module, PreconditionedOptimizer]]:
    """The named optimizer and its equivalent."""
    kind, more, rule, method, own = PAIRS[name]
    hyper = {key: value for key, value in rule.items() if key not in ('type', 'decay')}
    ours, theirs = net(), net()
    defaults = dict(stat_interval=100, refresh_interval=1000) if kind == 'AdaNKFAC' else {}
    layers = [dict(preconditioner=dict(type=method, **own, **{**defaults, **settings}))]
    return [
        (ours, getattr(mmprecond.optimizers, kind)(ours, **hyper, **more, **own, **settings)),
        (theirs, Preconditioned(theirs, rule=rule, layers=layers)),
    ]


@pytest.mark.parametrize('settings', [{}, SMALL, dict(SMALL, stat_interval=2)], ids=str)
@pytest.mark.parametrize('name', PAIRS)
def test_it_equals_the_named_optimizer(name: str, settings: dict[str, Any]) -> None:
    """Bit for bit, with small intervals, and past the second capture with the default ones."""
    (ours, named), (theirs, chosen) = pair(name, settings)
    second = named.curvature.stacks[0].method.stat_interval
    for steps in (range(0), range(1), range(1, 6), range(6, second + 2)):
        run(ours, named, steps), run(theirs, chosen, steps)
        assert differences(everything(ours, named), everything(theirs, chosen)) == []
    assert named.table() == chosen.table()
    assert named.defaults == chosen.defaults


@pytest.mark.parametrize('name', PAIRS)
def test_their_checkpoints_load_into_each_other(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for first, second in ((0, 1), (1, 0)):
        saver, loader = pair(name, SMALL)[first], pair(name, SMALL)[second]
        run(*saver, range(3))
        loader[0].load_state_dict(saver[0].state_dict())
        with caplog.at_level(logging.WARNING, 'mmprecond'):
            loader[1].load_state_dict(saved(saver[1].state_dict()))
        run(*saver, range(3, 7)), run(*loader, range(3, 7))
        assert differences(everything(*saver), everything(*loader)) == []
    assert warnings_of(caplog) == []


# ------------------------------------------------------------------- which layer takes what


def kinds(**chosen: str | None) -> dict[str, str]:
    """Expected methods: by the layer's last part, or `rest`."""
    found = {name: chosen.get(name.split('.')[-1], chosen.get('rest')) for name in NAMES}
    return {name: kind for name, kind in found.items() if kind}


K, F, A = 'NewtonKronecker', 'InputFeature', 'AttentionFeature'
TITLES = {K: 'NKFAC', F: 'FSGD', A: 'AFOpt'}
ORDERS: dict[str, tuple[list[dict[str, Any]], dict[str, str]]] = {
    'all': ([entry(KRONECKER)], kinds(rest=K)),
    'own class': ([entry(FEATURE, module_type='Conv2d'), entry(KRONECKER)], kinds(patch=F, rest=K)),
    'a class around': (
        [entry(FEATURE, module_type='FFN'), entry(KRONECKER)],
        kinds(up=F, down=F, rest=K),
    ),
    'two around': (
        [entry(FEATURE, module_type='Block'), entry(KRONECKER)],
        kinds(patch=K, head=K, rest=F),
    ),
    'a list of classes': (
        [entry(FEATURE, module_type=['FFN', 'Conv2d', 'Absent']), entry(KRONECKER)],
        kinds(up=F, down=F, patch=F, rest=K),
    ),
    'a tuple of classes': ([entry(FEATURE, module_type=('FFN',))], kinds(up=F, down=F)),
    'the model': ([entry(FEATURE, module_type='Net')], kinds(rest=F)),
    'a list alone': (
        [entry(FEATURE, module_type='ModuleList'), entry(KRONECKER)],
        kinds(patch=K, head=K, rest=F),
    ),
    'own name': ([entry(FEATURE, name='head'), entry(KRONECKER)], kinds(head=F, rest=K)),
    'a name around': (
        [entry(FEATURE, name='blocks.?.ffn'), entry(KRONECKER)],
        kinds(up=F, down=F, rest=K),
    ),
    'pattern': ([entry(FEATURE, name='*.[pd]*'), entry(KRONECKER)], kinds(proj=F, down=F, rest=K)),
    'prefix': ([entry(FEATURE, name='blocks.*'), entry(KRONECKER)], kinds(patch=K, head=K, rest=F)),
    'everything by name': ([entry(FEATURE, name='*')], kinds(rest=F)),
    'both keys': (
        [entry(FEATURE, module_type='Linear', name='blocks.*.ffn'), entry(KRONECKER)],
        kinds(up=F, down=F, rest=K),
    ),
    'first wins': (
        [entry(FEATURE, name='*.up'), entry(KRONECKER, module_type='FFN'), entry(ATTENTION)],
        kinds(up=F, down=K, rest=A),
    ),
    'special before general': (
        [entry(KRONECKER, name='*.qkv'), entry(FEATURE)],
        kinds(qkv=K, rest=F),
    ),
    'none first': (
        [entry(None, module_type='FFN'), entry(KRONECKER)],
        kinds(up=None, down=None, rest=K),
    ),
    'none last': ([entry(KRONECKER, name='head'), entry(None)], kinds(head=K)),
    'none between': (
        [entry(KRONECKER, name='*.up'), entry(None, module_type=['FFN', 'Conv2d']), entry(FEATURE)],
        kinds(up=K, down=None, patch=None, rest=F),
    ),
    'no match for some': (
        [entry(KRONECKER, name='blocks.*')],
        kinds(patch=None, head=None, rest=K),
    ),
    'attention': (
        [entry(ATTENTION, module_type='WindowMSA'), entry(KRONECKER)],
        kinds(qkv=A, proj=A, rest=K),
    ),
    'an empty match': ([dict(match={}, preconditioner=KRONECKER)], kinds(rest=K)),
    'match=None': ([dict(match=None, preconditioner=KRONECKER)], kinds(rest=K)),
}


@pytest.mark.parametrize('name', ORDERS)
def test_the_first_hit_wins(name: str) -> None:
    layers, expected = ORDERS[name]
    before = copy.deepcopy(layers)
    model = net()
    optimizer = Preconditioned(model, rule=RULE, layers=layers)
    assert methods(optimizer) == expected
    assert layers == before and RULE == dict(type='AdamW', lr=0.01, weight_decay=0.1)
    # Whoever is not preconditioned is listed, and so is every other module with parameters.
    norms = {f'blocks.{k}.norm' for k in (0, 1)}
    assert {left.name for left in optimizer.curvature.left_out} == norms | (
        set(NAMES) - set(expected)
    )
    lines = {line.split()[0]: line for line in optimizer.table().splitlines() if line}
    for layer in NAMES:
        assert TITLES.get(expected.get(layer, ''), 'plain rule: ') in lines[layer]
    run(model, optimizer, range(2))
    assert set(curvature(optimizer)) == {f'{layer}.weight' for layer in expected}


def test_the_model_may_be_a_single_layer() -> None:
    for match in (dict(module_type='Linear'), dict(name='*'), dict(name=''), {}):
        optimizer = Preconditioned(nn.Linear(3, 2), rule=RULE, layers=[entry(FEATURE, **match)])
        assert [layer.name for layer in optimizer.curvature.layers] == ['weight']


def test_names_are_those_of_the_users_model_inside_a_wrapper() -> None:
    model = nn.DataParallel(net())
    assert methods(
        Preconditioned(
            model,
            rule=RULE,
            layers=[entry(FEATURE, name='head'), entry(KRONECKER, module_type='Net')],
        )
    ) == kinds(head=F, rest=K)


def test_reasons_why_a_layer_takes_the_rule() -> None:
    layers = [
        entry(None, module_type='FFN'),
        entry(dict(KRONECKER, max_dim=9), name='blocks.0'),
        entry(FEATURE, name='patch'),
    ]
    model = net()
    groups = [
        dict(params=[p], precondition=name != 'head.weight') for name, p in model.named_parameters()
    ]
    optimizer = Preconditioned(groups, model=model, rule=RULE, layers=layers)
    reasons = {left.name: left.reason for left in optimizer.curvature.left_out}
    assert reasons['blocks.0.ffn.up'] == reasons['blocks.1.ffn.down'] == 'preconditioner=None'
    assert 'max_dim=9' in reasons['blocks.0.attn.qkv']
    assert reasons['blocks.1.attn.qkv'] == 'no entry of layers matches it'
    assert reasons['head'] == 'precondition=False'
    assert methods(optimizer) == {'patch': F, 'blocks.0.attn.proj': K}


# ------------------------------------------------------------------- several methods in one model


def test_each_layer_moves_as_its_method_moves_it_alone() -> None:
    """One step from equal weights: the layers of a mixed optimizer are those of pure ones."""
    rule = dict(type='SGDM', lr=0.1, momentum=0.0, weight_decay=0.1)
    mixed = net()
    run(mixed, Preconditioned(mixed, rule=rule, layers=MIXED), range(1))
    pure: dict[str, nn.Module] = {}
    for method in (KRONECKER, FEATURE, ATTENTION):
        pure[method['type']] = net()
        run(
            pure[method['type']],
            Preconditioned(pure[method['type']], rule=rule, layers=[entry(method)]),
            range(1),
        )
    plain = net()
    run(plain, torch.optim.SGD(plain.parameters(), lr=0.1, weight_decay=0.1), range(1))
    chosen = methods(Preconditioned(net(), rule=rule, layers=MIXED))
    assert set(chosen.values()) == set(pure)
    for name, p in mixed.named_parameters():
        other = pure.get(chosen.get(name.rpartition('.')[0], ''), plain).get_parameter(name)
        torch.testing.assert_close(p, other, rtol=0, atol=1e-14)


def due_layers(model: nn.Module) -> set[str]:
    """Methods whose hooks are on, by a module that each of them watches."""
    watched = {K: model.patch, F: model.blocks[1].ffn.up, A: model.blocks[0].attn.qkv}
    return {kind for kind, module in watched.items() if module._forward_hooks}


def test_each_method_keeps_its_own_intervals() -> None:
    """Kronecker 1/2, input features 2/4, attention 3/3, in one run."""
    model = net()
    optimizer = Preconditioned(model, rule=RULE, layers=MIXED)
    intervals = {K: (1, 2), F: (2, 4), A: (3, 3)}
    before: dict[str, Any] = {}
    for step in range(13):
        due = {kind for kind, (stat, _) in intervals.items() if step % stat == 0}
        optimizer.arm()
        assert due_layers(model) == due
        run(model, optimizer, range(step, step + 1))
        now = curvature(optimizer)
        for name, state in now.items():
            old = before.get(name)
            merged = old is None or bool(differences(old['statistics'], state['statistics']))
            renewed = old is None or bool(differences(old['operator'], state['operator']))
            stat, refresh = intervals[state['method']]
            assert merged == (step % stat == 0), (name, step)
            assert renewed == (step % refresh == 0), (name, step)
            assert state['refreshes'] == 1 + step // refresh
        before = now
    assert len(before) == len(NAMES) - 1


def test_statistics_do_not_mix() -> None:
    """With lr=0 each layer's curvature is what its method measures alone, over eight steps."""
    rule = dict(type='AdamW', lr=0.0)
    model = net()
    optimizer = Preconditioned(model, rule=rule, layers=MIXED)
    run(model, optimizer, range(8))
    mixed = curvature(optimizer)
    for method in (KRONECKER, FEATURE, ATTENTION):
        model = net()
        alone = Preconditioned(model, rule=rule, layers=[entry(method)])
        run(model, alone, range(8))
        states = curvature(alone)
        mine = {name for name, state in mixed.items() if state['method'] == method['type']}
        assert mine
        for name in mine:
            assert mixed[name].keys() == states[name].keys()
            for part in ('statistics', 'operator'):
                assert mixed[name][part].keys() == states[name][part].keys()
                for key, value in mixed[name][part].items():
                    torch.testing.assert_close(value, states[name][part][key], rtol=1e-10, atol=0)


def test_equal_entries_share_a_stack_and_different_ones_do_not() -> None:
    other = dict(KRONECKER, damping=0.5)
    layers = [entry(KRONECKER, name='blocks.0'), entry(other, name='blocks.1'), entry(None)]
    optimizer = Preconditioned(net(), rule=RULE, layers=layers)
    assert (
        sorted(stack.method.damping for stack in optimizer.curvature.stacks)
        == [0.01] * 4 + [0.5] * 4
    )
    layers[1] = entry(dict(KRONECKER), name='blocks.1')
    assert len(Preconditioned(net(), rule=RULE, layers=layers).curvature.stacks) == 4


@pytest.mark.parametrize('rule', [RULE, SGDM, ADAN], ids=lambda rule: rule['type'])
def test_one_parameter_a_group_equals_one_group(rule: dict[str, Any]) -> None:
    """A weight and its bias in two groups have one direction, whatever their method."""
    model, other = net(), net()
    whole = Preconditioned(model, rule=rule, layers=MIXED)
    split = Preconditioned(
        [dict(params=[p]) for p in other.parameters()], model=other, rule=rule, layers=MIXED
    )
    run(model, whole, range(7)), run(other, split, range(7))
    assert differences(model.state_dict(), other.state_dict()) == []


# ------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize('rule', [RULE, SGDM, ADAN], ids=lambda rule: rule['type'])
@pytest.mark.parametrize('at', [1, 2, 3, 5, 6])
def test_mixed_methods_resume_bit_for_bit(
    at: int, rule: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    optimizer = Preconditioned(model, rule=rule, layers=MIXED)
    run(model, optimizer, range(at))
    twin = copy.deepcopy(model)
    resumed = Preconditioned(twin, rule=rule, layers=MIXED)
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        resumed.load_state_dict(saved(optimizer.state_dict()))
    assert warnings_of(caplog) == []
    run(model, optimizer, range(at, 13)), run(twin, resumed, range(at, 13))
    assert differences(everything(model, optimizer), everything(twin, resumed)) == []


def test_input_diagonals_are_adaact_where_every_parameter_has_inputs() -> None:
    """Others have momentum under EMASGD, and none in AdaAct."""
    for norm in (False, True):
        found = []
        for kind in ('AdaAct', 'Preconditioned'):
            torch.manual_seed(0)
            layers = [nn.Linear(5, 6), *([nn.LayerNorm(6)] if norm else []), nn.Tanh()]
            model = nn.Sequential(*layers, nn.Linear(6, 3)).double()
            if kind == 'AdaAct':
                optimizer: Any = mmprecond.optimizers.AdaAct(model, lr=0.01, weight_decay=0.1)
            else:
                rule = dict(type='EMASGD', lr=0.01, weight_decay=0.1)
                entry_of_all = dict(
                    preconditioner=dict(type='InputDiagonal', stat_interval=1, refresh_interval=1)
                )
                optimizer = Preconditioned(model, rule=rule, layers=[entry_of_all])
            for step in range(4):
                x = torch.randn(7, 5, generator=torch.Generator().manual_seed(step)).double()
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
            found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert (float((found[0] - found[1]).abs().max()) > 1e-7) == norm
