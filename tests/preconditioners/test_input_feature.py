"""FSGD and FAdam: whole trajectories against a slow reference in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond.optimizers import FSGD, FAdam, PreconditionedOptimizer
from tests.reference.factors import Loss, plain_copy
from tests.reference.feature import Feature, ReferenceFeature
from tests.reference.rules import ReferenceAdamW, ReferenceSGDM
from tests.support.errors import refused
from tests.support.networks import ConvNet, TokenNet, classification
from tests.support.trajectories import Convs, Tokens, follow, make_loss
from tests.support.trajectories import batch as rows

SGD = dict(lr=0.05, momentum=0.9, weight_decay=0.01)
ADAM = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.1)
RULES = {'FSGD': SGD, 'FAdam': ADAM}


def both(
    make: Callable[[], nn.Module], rule: dict[str, Any], **settings: Any
) -> tuple[nn.Module, PreconditionedOptimizer, ReferenceFeature]:
    torch.manual_seed(0)
    model = make().double()
    settings = dict(stat_interval=1, refresh_interval=1) | settings
    steps = (
        ReferenceAdamW(rule['betas'], rule['eps'])
        if 'betas' in rule
        else ReferenceSGDM(rule['momentum'])
    )
    reference = ReferenceFeature(
        plain_copy(model), steps, rule['lr'], rule['weight_decay'], **settings
    )
    return (
        model,
        (FAdam if 'betas' in rule else FSGD)(model, **rule, **settings, settings='published'),
        reference,
    )


@pytest.mark.parametrize(
    'settings',
    [
        {},
        dict(stat_interval=2, refresh_interval=4),
        dict(exponent=0.5),
        dict(exponent=0.5, stat_interval=2, refresh_interval=4),
        dict(norm_recovery=False, damping=0.3),
    ],
    ids=str,
)
@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('make', [ConvNet, TokenNet])
def test_trajectories(make: Any, rule: str, settings: dict[str, Any]) -> None:
    model, optimizer, reference = both(make, RULES[rule], **settings)
    follow(model, optimizer, reference, classification(make), 6)


@pytest.mark.parametrize(
    'settings',
    [
        dict(stat_decay=0.0),
        dict(stat_decay=0.5, damping=1.0),
        dict(damping=1e-4),
        dict(exponent=2.0),
        dict(exponent=0.25),
        dict(stat_interval=3, refresh_interval=3),
        dict(exponent=0.5, norm_recovery=False),
    ],
    ids=str,
)
def test_settings(settings: dict[str, Any]) -> None:
    model, optimizer, reference = both(Tokens, SGD, **settings)
    follow(model, optimizer, reference, lambda t: [make_loss(rows(t, features=6))], 7)


@pytest.mark.parametrize('exponent', [1.0, 0.5])
@pytest.mark.parametrize('rule', RULES)
def test_grouped_convolutions(rule: str, exponent: float) -> None:
    """One R a group, and one norm for the layer."""
    model, optimizer, reference = both(Convs, RULES[rule], exponent=exponent)
    assert {layer.name: layer.blocks for layer in optimizer.curvature.layers} == {
        'stem.weight': 1,
        'depthwise.weight': 4,
        'grouped.weight': 2,
        'head.weight': 1,
    }
    follow(model, optimizer, reference, lambda t: [make_loss(rows(t))], 3)


@pytest.mark.parametrize('kind', [FSGD, FAdam])
def test_default_settings(kind: type[PreconditionedOptimizer]) -> None:
    optimizer = kind(TokenNet(), lr=0.1)
    (method,) = {stack.method for stack in optimizer.curvature.stacks}
    assert (method.stat_interval, method.refresh_interval) == (50, 500)
    assert (method.stat_decay, method.damping, method.exponent) == (0.95, 0.01, 1.0)
    assert method.norm_recovery and all(
        [s.key for s in stack.kept] == ['input_moment_sampled']
        for stack in optimizer.curvature.stacks
    )
    assert (method.solver, method.rank_share, method.input_factor) == ('lowrank', 1 / 16, 'auto')
    assert method.early_refreshes and method.max_rows == 512


@pytest.mark.parametrize('rule', RULES)
def test_default_intervals(rule: str) -> None:
    """Steps 0 and 50 measure; the operator of step 0 stays."""
    default = dict(stat_interval=50, refresh_interval=500)
    model, optimizer, reference = both(TokenNet, RULES[rule], **default)
    same = (FSGD if rule == 'FSGD' else FAdam)(
        copy.deepcopy(model), **RULES[rule], settings='published'
    )
    assert {stack.method for stack in same.curvature.stacks} == {
        stack.method for stack in optimizer.curvature.stacks
    }
    follow(model, optimizer, reference, classification(TokenNet), 53)
    for weight, (blocks, _) in reference.factors.items():
        entry = optimizer.state_dict()['precond']['layers'][reference.names[weight]]
        assert entry['refreshes'] == blocks[0].refreshes == 1
        torch.testing.assert_close(
            entry['statistics']['input_moment'][0], blocks[0].running, rtol=0, atol=1e-9
        )


def test_the_second_default_refresh_is_at_step_500() -> None:
    """R is the running average of the captures at steps 0, 50, ..., 500, not their last one."""
    model = nn.Linear(3, 2).double()
    optimizer = FSGD(model, lr=0.0, weight_decay=0.0, settings='published')
    feature = Feature(dict(stat_decay=0.95, exponent=1.0))
    for step in range(501):
        x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        if step % 50 == 0:
            joint = torch.cat([x, torch.ones(4, 1).double()], 1)
            feature.merge(joint.t() @ joint / 4)
        entry = optimizer.state_dict()['precond']['layers']['weight']
        assert entry['refreshes'] == (1 if step < 500 else 2)
    feature.refresh(0.01)
    torch.testing.assert_close(
        entry['operator']['input_moment'][0], feature.inverse, rtol=1e-9, atol=0
    )


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('make', [Convs, Tokens])
def test_accumulation(make: Any, rule: str) -> None:
    """Micro-batches of unequal size, against the reference and against the joint batch."""
    model, optimizer, reference = both(make, RULES[rule])
    if make is Convs:  # batch statistics differ between micro-batches and the joint batch
        model.norm.eval(), reference.model.norm.eval()
    joint = copy.deepcopy(model)
    whole = type(optimizer)(joint, **RULES[rule], stat_interval=1, refresh_interval=1)

    def parts(step: int) -> list[Loss]:
        x = rows(step, 5, make.features)
        return [make_loss(x[:2], 5 / 2), make_loss(x[2:], 5 / 3)]

    for step in range(3):
        follow(model, optimizer, reference, lambda _, step=step: parts(step), 1)
        whole.zero_grad()
        make_loss(rows(step, 5, make.features))(joint).backward()
        whole.step()
        for a, b in zip(model.parameters(), joint.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize('rule', RULES)
def test_settings_of_single_parameters(rule: str) -> None:
    """A bias with lr and decay of its own stays in its layer's direction."""
    overrides = {
        'first.bias': dict(lr=0.08, weight_decay=0.0),
        'last.weight': dict(damping=0.5),
        'second.weight': dict(precondition=False),
        'second.bias': dict(precondition=False),
        'third.bias': dict(precondition=False),
    }
    model, _, reference = both(Tokens, RULES[rule])
    reference = ReferenceFeature(
        reference.model,
        reference.rule,
        RULES[rule]['lr'],
        RULES[rule]['weight_decay'],
        overrides=overrides,
    )
    groups = [dict(params=[p], **overrides.get(name, {})) for name, p in model.named_parameters()]
    optimizer = (FSGD if rule == 'FSGD' else FAdam)(
        groups, model=model, **RULES[rule], stat_interval=1, refresh_interval=1
    )
    follow(model, optimizer, reference, lambda t: [make_loss(rows(t, features=6))], 4)


def test_undamped_it_is_least_squares_in_feature_space() -> None:
    """The change of the weight whose outputs come closest to minus the outputs' gradient."""
    model = nn.Linear(4, 3, bias=False).double()
    optimizer = FSGD(
        model,
        lr=1.0,
        momentum=0.0,
        stat_decay=0.0,
        damping=1e-13,
        norm_recovery=False,
        settings='published',
    )
    x = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = model.weight.detach().clone()
    out = model(x)
    slope: Tensor
    (slope,) = torch.autograd.grad(out.pow(4).mean(), out, retain_graph=True)
    out.pow(4).mean().backward()
    optimizer.step()
    best = torch.linalg.lstsq(x, -slope).solution.t()
    # R is a mean over rows where the Gram matrix is a sum.
    torch.testing.assert_close(model.weight.detach() - before, len(x) * best, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('kind', [FSGD, FAdam])
@pytest.mark.parametrize(
    'name, value, remedy',
    [
        ('exponent', 0, 'greater than 0'),
        ('exponent', -0.5, 'greater than 0'),
        ('exponent', 'half', 'give a number'),
        ('exponent', float('nan'), 'give a number'),
        ('damping', 0, 'greater than 0'),
        ('damping', -0.01, 'greater than 0'),
        ('stat_decay', 1, 'less than 1'),
        ('stat_interval', 0, 'at least 1'),
        ('refresh_interval', 75, 'multiple of stat_interval=50'),
        ('stat_interval', 3, 'multiple'),
        ('lr', -1.0, 'at least 0'),
        ('weight_decay', -1.0, 'at least 0'),
        ('max_dim', 0, 'at least 1'),
        ('oversize', 'crop', 'skip, one_sided'),
    ],
)
def test_values_out_of_range(kind: Any, name: str, value: Any, remedy: str) -> None:
    refused(ValueError, lambda: kind(nn.Linear(2, 2), **{'lr': 0.1, name: value}), name, remedy)


@pytest.mark.parametrize(
    'kind, key',
    [
        (FSGD, 'betas'),
        (FAdam, 'momentum'),
        (FSGD, 'damping_floor'),
        (FAdam, 'newton_steps'),
        (FSGD, 'variant'),
        (FAdam, 'decay'),
    ],
)
def test_a_left_over_key_says_delete(kind: Any, key: str) -> None:
    refused(
        TypeError,
        lambda: kind(nn.Linear(2, 2), lr=0.1, **{key: 1}),
        kind.__name__,
        key,
        '`_delete_=True`',
        'exponent',
    )


def test_a_model_and_its_parameters() -> None:
    refused(
        ValueError,
        lambda: FSGD(nn.Linear(2, 2).parameters(), lr=0.1, settings='published'),
        'FSGD',
        'model=',
        "constructor='PrecondOptimWrapperConstructor'",
    )
