"""AdamR: frozen layers, mixing with other methods, settings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from mmprecond.optimizers import AdamR, Preconditioned, PreconditionedOptimizer
from mmprecond.preconditioners import EigenRotation
from mmprecond.rules import AdamW, Adan
from tests.reference.factors import plain_copy
from tests.support.errors import refused
from tests.support.rotation import ADAMW, LATE, SECOND, both, entry, equals, run, stepped, tokens
from tests.support.states import saved
from tests.support.trajectories import Tokens


@pytest.mark.parametrize('frozen', ['third.bias', 'first.weight', 'second'])
def test_frozen_parameters(frozen: str) -> None:
    """With a frozen bias the direction of G = [G_W | 0], or that of G_W alone, is right."""
    model, optimizer, reference = both(Tokens, **SECOND)
    alone = both(Tokens, overrides={'third.bias': dict(precondition=False)}, **SECOND)[2]
    for net in (model, reference.model, alone.model):
        part = (net.get_submodule if '.' not in frozen else net.get_parameter)(frozen)
        part.requires_grad_(False)
    run(model, optimizer, range(9))
    for step in range(9):
        reference.step(*tokens(step)), alone.step(*tokens(step))
    assert equals(model, reference.model, 1e-9) or equals(model, alone.model, 1e-9)


@pytest.mark.parametrize('frozen', ['third.weight', 'third.bias'])
def test_a_part_that_is_frozen_in_the_run(frozen: str) -> None:
    """The other part goes on in the rotated space, where the frozen one has zero gradients."""
    model, optimizer, reference = both(Tokens, **SECOND)
    for steps in (range(5), range(5, 12)):
        run(model, optimizer, steps)
        for step in steps:
            reference.step(*tokens(step))
        for net in (model, reference.model):
            net.get_parameter(frozen).requires_grad_(False)
    assert equals(model, reference.model, 1e-9)


def mixed(rule: dict[str, Any]) -> list[dict[str, Any]]:
    settings = dict(stat_interval=2, refresh_interval=4, **LATE)
    return [
        dict(match=dict(name='first'), preconditioner=dict(type='EigenRotation', **settings)),
        dict(match=dict(name='last'), preconditioner=None),
        dict(preconditioner=dict(type=rule, **settings)),
    ]


def preconditioned(
    model: nn.Module, layers: list[dict[str, Any]], **rule: Any
) -> PreconditionedOptimizer:
    return Preconditioned(model, layers=layers, rule=dict(type='AdamW', **ADAMW) | rule)


def test_preconditioned_is_adamr() -> None:
    model, optimizer, _ = both(Tokens, **SECOND)
    twin = plain_copy(model)
    other = preconditioned(
        twin, [dict(preconditioner=dict(type='EigenRotation', **SECOND, **LATE))]
    )
    run(model, optimizer, range(9)), run(twin, other, range(9))
    assert equals(model, twin, 0.0)


def test_mixed_methods_each_keep_their_steps() -> None:
    """One counts steps from 1, the other from 0; both work on the same rule."""
    model = Tokens().double()
    optimizer = preconditioned(model, mixed('NewtonKronecker'))
    assert {
        layer.name: type(stack.method).__name__
        for layer, stack in optimizer.curvature.layers.items()
    } == {
        'first.weight': 'EigenRotation',
        'second.weight': 'NewtonKronecker',
        'third.weight': 'NewtonKronecker',
    }
    run(model, optimizer, range(1))
    assert set(optimizer.state_dict()['precond']['layers']) == {'second.weight', 'third.weight'}
    run(model, optimizer, range(1, 6))
    for name, samples, refreshes in (('first.weight', 3, 1), ('second.weight', 3, 2)):
        found = entry(optimizer, name)
        assert (found['samples'], found['refreshes']) == (samples, refreshes)
    # A layer's step depends on its own method alone.
    kept, twin = saved(optimizer.state_dict()), copy.deepcopy(model)
    again = preconditioned(twin, mixed('NewtonKronecker'))
    again.load_state_dict(copy.deepcopy(kept))
    ours = stepped(twin, again, 6)
    for kind, name in (('EigenRotation', 'first.weight'), ('NewtonKronecker', 'second.weight')):
        other = copy.deepcopy(model)
        lone = preconditioned(other, [dict(preconditioner=dict(type=kind, **SECOND))])
        state = copy.deepcopy(kept)
        state['precond']['layers'] = {name: state['precond']['layers'][name]}
        lone.load_state_dict(state)
        torch.testing.assert_close(stepped(other, lone, 6)[name], ours[name], rtol=0, atol=1e-12)


def test_it_does_not_work_with_sgdm() -> None:
    refused(
        ValueError,
        lambda: Preconditioned(
            Tokens(), rule=dict(type='SGDM', lr=0.1), layers=mixed('NewtonKronecker')
        ),
        'AdamR',
        'SGDM',
        "rule=dict(type='AdamW'",
    )


# ------------------------------------------------------------------- settings


def test_default_settings() -> None:
    optimizer = AdamR(nn.Linear(3, 2), lr=0.1)
    (method,) = {stack.method for stack in optimizer.curvature.stacks}
    assert (
        method
        == EigenRotation()
        == EigenRotation(
            stat_interval=100,
            refresh_interval=1000,
            basis_eps=0.01,
            basis_solver='eigh',
            rotate_moments=True,
        )
    )
    assert type(optimizer.rule) is AdamW and optimizer.rule.decay == 'decoupled'
    assert optimizer.defaults == dict(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    adan = AdamR(nn.Linear(3, 2), lr=0.1, rule='Adan')
    assert type(adan.rule) is Adan and adan.defaults['betas'] == (0.98, 0.92, 0.99)


@pytest.mark.parametrize(
    'name, value, remedy',
    [
        ('basis_eps', -0.1, 'at least 0'),
        ('basis_eps', float('nan'), 'give a number'),
        ('basis_solver', 'svd', 'eigh, qr'),
        ('rotate_moments', 1, 'neither True nor False'),
        ('rotate_moments', None, 'neither True nor False'),
        ('rule', 'SGDM', 'AdamW, Adan'),
        ('rule', None, 'AdamW, Adan'),
        ('stat_interval', 0, 'at least 1'),
        ('stat_interval', 300, 'multiple'),
        ('refresh_interval', 150, 'multiple'),
        ('betas', (0.9,), 'betas=(0.9, 0.999)'),
        ('eps', -1.0, 'at least 0'),
        ('max_dim', 0, 'at least 1'),
        ('oversize', 'crop', 'skip, one_sided'),
        ('oversize', 'lowrank', "choose 'skip' or 'one_sided'"),
    ],
)
def test_values_out_of_range(name: str, value: Any, remedy: str) -> None:
    refused(ValueError, lambda: AdamR(nn.Linear(2, 2), **{'lr': 0.1, name: value}), name, remedy)


@pytest.mark.parametrize('key', ['momentum', 'damping', 'stat_decay', 'norm_recovery', 'decay'])
def test_a_left_over_key_says_delete(key: str) -> None:
    refused(
        TypeError,
        lambda: AdamR(nn.Linear(2, 2), lr=0.1, **{key: 0.9}),
        'AdamR',
        key,
        '`_delete_=True`',
        'basis_eps',
    )


def test_a_model_and_its_parameters() -> None:
    refused(
        ValueError,
        lambda: AdamR(nn.Linear(2, 2).parameters(), lr=0.1),
        'AdamR',
        'model=',
        "constructor='PrecondOptimWrapperConstructor'",
    )
