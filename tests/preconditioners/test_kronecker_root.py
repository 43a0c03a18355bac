"""SGDMBK and AdamWBK against a slow reference in float64, and the inverse roots they rest on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mmprecond.optimizers import SGDMBK, AdamWBK, Preconditioned, PreconditionedOptimizer
from mmprecond.preconditioners import KroneckerRoot
from tests.reference.factors import Loss, plain_copy
from tests.reference.root import ReferenceRoot
from tests.support.errors import refused
from tests.support.states import differences, everything, saved
from tests.support.trajectories import Convs, Tokens, follow, make_loss
from tests.support.trajectories import batch as rows

SGD = dict(lr=0.05, momentum=0.9, weight_decay=0.01)
ADAM = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.02)
RULES = {'SGDMBK': SGD, 'AdamWBK': ADAM}
KINDS = {'SGDMBK': SGDMBK, 'AdamWBK': AdamWBK}
EVERY = dict(stat_interval=1, refresh_interval=1)


def both(
    make: Callable[[], nn.Module], rule: str, **settings: Any
) -> tuple[nn.Module, PreconditionedOptimizer, ReferenceRoot]:
    torch.manual_seed(0)
    model = make().double()
    settings = EVERY | settings
    reference = ReferenceRoot(plain_copy(model), **RULES[rule], **settings)
    return model, KINDS[rule](model, **RULES[rule], **settings, settings='published'), reference


def losses(make: Any) -> Callable[[int], list[Loss]]:
    return lambda step: [make_loss(rows(step, 9 if make.features else 3, make.features))]


# ------------------------------------------------------------------- trajectories


@pytest.mark.parametrize('solver', ['newton_schulz', 'eigh'])
@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('make', [Convs, Tokens])
def test_every_step_measures_and_refreshes(make: Any, rule: str, solver: str) -> None:
    """With groups, shared weights and a head for three levels."""
    model, optimizer, reference = both(make, rule, solver=solver)
    follow(model, optimizer, reference, losses(make), 4 if make is Convs else 8)


@pytest.mark.parametrize(
    'options',
    [
        dict(stat_interval=2, refresh_interval=4),
        dict(stat_interval=3, refresh_interval=3),
        dict(refresh_interval=2, stat_decay=0.0),
        dict(root_steps=1),
        dict(root_steps=4),
        dict(root_steps=25),
        dict(damping=0.3, stat_decay=0.5),
        dict(solver='eigh', damping=1e-8, refresh_interval=3),
    ],
    ids=str,
)
@pytest.mark.parametrize('rule', RULES)
def test_settings(rule: str, options: dict[str, Any]) -> None:
    model, optimizer, reference = both(Tokens, rule, **options)
    follow(model, optimizer, reference, losses(Tokens), 9)


@pytest.mark.parametrize('rule', RULES)
def test_a_layer_used_now_and_then(rule: str) -> None:
    """Zero rows are no capture, and a layer that joins late is refreshed at once."""
    model, optimizer, reference = both(Tokens, rule, stat_interval=2, refresh_interval=4)
    follow(
        model,
        optimizer,
        reference,
        lambda t: [make_loss(rows(t, features=6), use_second=t in (3, 6, 7, 9))],
        11,
    )


@pytest.mark.parametrize('rule', RULES)
def test_accumulation(rule: str) -> None:
    model, optimizer, reference = both(Tokens, rule)
    joint = copy.deepcopy(model)
    whole = KINDS[rule](joint, **RULES[rule], **EVERY)
    for step in range(4):
        x = rows(step, 9, 6)
        parts = [make_loss(x[:2], 9 / 2), make_loss(x[2:], 9 / 7)]
        follow(model, optimizer, reference, lambda _, parts=parts: parts, 1)
        whole.zero_grad()
        make_loss(x)(joint).backward()
        whole.step()
        for a, b in zip(model.parameters(), joint.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize('rule', RULES)
def test_settings_of_single_parameters(rule: str) -> None:
    overrides = {
        'first.bias': dict(lr=0.08, weight_decay=0.0),
        'last.weight': dict(damping=0.5),
        'second.weight': dict(precondition=False),
        'third.bias': dict(precondition=False),
    }
    model = both(Tokens, rule)[0]
    reference = ReferenceRoot(plain_copy(model), **RULES[rule], overrides=overrides)
    groups = [dict(params=[p], **overrides.get(name, {})) for name, p in model.named_parameters()]
    optimizer = KINDS[rule](groups, model=model, **RULES[rule], **EVERY)
    follow(model, optimizer, reference, losses(Tokens), 4)


@pytest.mark.parametrize('rule', RULES)
def test_preconditioned_is_adabk(rule: str) -> None:
    model, optimizer, _ = both(Tokens, rule)
    twin = plain_copy(model)
    kind = dict(type='SGDM') if rule == 'SGDMBK' else dict(type='AdamW', decay='published')
    other = Preconditioned(
        twin,
        rule=kind | RULES[rule],
        layers=[dict(preconditioner=dict(type='KroneckerRoot', **EVERY, settings='published'))],
    )
    for step in range(5):
        for net, opt in ((model, optimizer), (twin, other)):
            opt.zero_grad()
            losses(Tokens)(step)[0](net).backward()
            opt.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('at', [1, 2, 4, 5])
@pytest.mark.parametrize('solver', ['newton_schulz', 'eigh'])
def test_a_resumed_run_continues_bit_for_bit(solver: str, at: int) -> None:
    options = ADAM | dict(stat_interval=2, refresh_interval=4, solver=solver)

    def run(model: nn.Module, optimizer: PreconditionedOptimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            make_loss(rows(step, features=6).float())(model).backward()
            optimizer.step()

    model = Tokens()
    optimizer = AdamWBK(model, **options, settings='published')
    run(model, optimizer, range(at))
    twin = copy.deepcopy(model)
    resumed = AdamWBK(twin, **options, settings='published')
    resumed.load_state_dict(saved(optimizer.state_dict()))
    run(model, optimizer, range(at, 9)), run(twin, resumed, range(at, 9))
    assert differences(everything(model, optimizer), everything(twin, resumed)) == []


# ------------------------------------------------------------------- settings


def test_default_settings() -> None:
    for kind in KINDS.values():
        optimizer = kind(nn.Linear(3, 2), lr=0.1)
        (method,) = {stack.method for stack in optimizer.curvature.stacks}
        assert (
            method
            == KroneckerRoot()
            == KroneckerRoot(
                stat_interval=200,
                refresh_interval=2000,
                stat_decay=0.9,
                damping=1e-5,
                solver='newton_schulz',
                root_steps=10,
            )
        )
    assert optimizer.rule.decay == 'published'
    usual = dict(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, damping=1e-5)
    assert optimizer.defaults == usual


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    'name, value, remedy',
    [
        ('solver', 'newton', 'newton_schulz, eigh'),
        ('solver', None, 'newton_schulz, eigh'),
        ('root_steps', 0, 'at least 1'),
        ('root_steps', 10.0, 'at least 1'),
        ('damping', 0.0, 'greater than 0'),
        ('damping', float('nan'), 'give a number'),
        ('stat_decay', 1.0, 'less than 1'),
        ('stat_decay', -0.1, 'at least 0'),
        ('stat_interval', 300, 'multiple'),
        ('refresh_interval', 100, 'stat_interval=200'),
        ('max_dim', 0, 'at least 1'),
        ('oversize', 'crop', 'skip, one_sided'),
        ('lr', -1.0, 'at least 0'),
        ('weight_decay', None, 'at least 0'),
    ],
)
def test_values_out_of_range(kind: str, name: str, value: Any, remedy: str) -> None:
    refused(
        ValueError, lambda: KINDS[kind](nn.Linear(2, 2), **{'lr': 0.1, name: value}), name, remedy
    )


@pytest.mark.parametrize(
    'kind, key',
    [
        ('SGDMBK', 'betas'),
        ('AdamWBK', 'momentum'),
        ('SGDMBK', 'exponent'),
        ('AdamWBK', 'newton_steps'),
        ('SGDMBK', 'damping_floor'),
        ('AdamWBK', 'decay'),
    ],
)
def test_a_left_over_key_says_delete(kind: str, key: str) -> None:
    refused(
        TypeError,
        lambda: KINDS[kind](nn.Linear(2, 2), lr=0.1, **{key: 1}),
        kind,
        key,
        '`_delete_=True`',
        'root_steps',
    )


def test_a_model_and_its_parameters() -> None:
    for kind, cls in KINDS.items():
        refused(
            ValueError,
            lambda: cls(nn.Linear(2, 2).parameters(), lr=0.1),
            kind,
            'model=',
            "constructor='PrecondOptimWrapperConstructor'",
        )
