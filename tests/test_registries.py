"""Rules, preconditioners, layers and attention modules of others: registered, used, or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from mmprecond.curvature import (
    LAYER_TYPES,
    Conv2dLayer,
    Layer,
    LinearLayer,
    Mean,
    Side,
    Statistic,
    WindowAttention,
    qualified_name,
    register_attention,
    register_layer,
)
from mmprecond.optimizers import KFAC, NKFAC, AdamR, AFOpt, Preconditioned
from mmprecond.preconditioners import (
    METHODS,
    Preconditioner,
    register_preconditioner,
)
from mmprecond.rules import RULES, AdamW, Rule, register_rule
from tests.support.errors import refused
from tests.support.registered import Grouped, InputScale, MyLinear, SignSGD, method

pytestmark = pytest.mark.usefixtures('registries_as_they_were')


# ------------------------------------------------------------------- rules


class RAdamLike(AdamW):
    """An element-wise rule of another's."""


def train(model: nn.Module, optimizer: Any, steps: int = 3) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(
            torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        ).square().mean().backward()
        optimizer.step()


def test_a_rule_of_others() -> None:
    register_rule(SignSGD)
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    optimizer = Preconditioned(
        model,
        rule=dict(type='SignSGD', lr=0.5),
        layers=[dict(preconditioner=dict(type='NewtonKronecker'))],
    )
    train(model, optimizer, 1)
    torch.testing.assert_close((model.weight - before).abs(), torch.full_like(before, 0.5))


def test_a_rotation_takes_every_elementwise_rule() -> None:
    rotation = [
        dict(preconditioner=dict(type='EigenRotation', stat_interval=1, refresh_interval=1))
    ]
    register_rule(RAdamLike)
    register_rule(SignSGD)
    models = [nn.Linear(4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, kind in zip(models, ('AdamW', 'RAdamLike'), strict=True):
        train(model, Preconditioned(model, rule=dict(type=kind, lr=0.1), layers=rotation))
    assert torch.equal(models[0].weight, models[1].weight)
    refused(
        ValueError,
        lambda: Preconditioned(models[0], rule=dict(type='SignSGD', lr=0.1), layers=rotation),
        'AdamR does not work with the rule SignSGD',
        ' or '.join(name for name, rule in RULES.items() if rule.elementwise),
    )


def broken(**members: Any) -> type:
    return type('Broken', (SignSGD,), members)


@pytest.mark.parametrize(
    'make, error, words',
    [
        (lambda: dict, TypeError, 'takes a subclass of Rule'),
        (
            lambda: type('Half', (Rule,), {}),
            TypeError,
            'must define apply_updates, compute_updates',
        ),
        (
            lambda: type('AdamW', (SignSGD,), {}),
            ValueError,
            "'AdamW' belongs to mmprecond.rules.adam",
        ),
        (lambda: broken(hyper=('lr',)), ValueError, 'no weight_decay'),
        (lambda: broken(hyper=('lr', 'weight_decay', 'beta')), ValueError, 'defaults has no beta'),
    ],
)
def test_rules_that_are_refused(
    make: Callable[[], Any], error: type[Exception], words: str
) -> None:
    before = dict(RULES)
    refused(error, lambda: register_rule(make()), words)
    assert before == RULES


# ------------------------------------------------------------------- preconditioners


def test_a_preconditioner_of_others() -> None:
    register_preconditioner(InputScale)
    model = nn.Linear(4, 3, bias=False)
    optimizer = Preconditioned(
        model,
        rule=dict(type='SGDM', lr=0.1, momentum=0.0),
        layers=[dict(preconditioner=dict(type='InputScale', stat_interval=1, refresh_interval=1))],
        matmul_precision='highest',
    )
    before = model.weight.detach().clone()
    x = torch.randn(6, 4)
    model(x).square().mean().backward()
    optimizer.step()
    scaled = model.weight.grad * x.square().mean(0)
    torch.testing.assert_close(model.weight, before - 0.1 * scaled)
    again = Preconditioned(
        model, rule=dict(type='SGDM', lr=0.1), layers=[dict(preconditioner=dict(type='InputScale'))]
    )
    again.load_state_dict(optimizer.state_dict())
    assert again.state_dict()['precond']['layers'].keys() == {'weight'}


@pytest.mark.parametrize(
    'make, error, words',
    [
        (lambda: InputScale(), TypeError, 'takes a subclass of Preconditioner'),
        (lambda: type('Bare', (InputScale,), {}), TypeError, 'no dataclass of its own'),
        (
            lambda: dataclass(frozen=True, kw_only=True)(type('Half', (Preconditioner,), {})),
            TypeError,
            'must define apply, average, refresh',
        ),
        (lambda: method(statistics=('grad_moment',)), TypeError, "'grad_moment', which is no Stat"),
        (lambda: method(published=dict(dampign=1.0)), ValueError, 'names dampign'),
        (lambda: method(__annotations__={'extra': int}), ValueError, 'has no default for extra'),
        (lambda: method(variants=dict(Own=dict(dampign=1.0))), ValueError, 'Own of Other names'),
        (lambda: method('InputFeature'), ValueError, "'InputFeature' belongs to mmprecond"),
    ],
)
def test_preconditioners_that_are_refused(
    make: Callable[[], Any], error: type[Exception], words: str
) -> None:
    before = dict(METHODS)
    refused(error, lambda: register_preconditioner(make()), words)
    assert before == METHODS


def test_a_statistic_that_no_layer_has_is_refused_at_construction() -> None:
    model = nn.Linear(4, 3)
    for kind, error, words in (
        (method(statistics=('input_moment',)), TypeError, 'is no Statistic'),
        (
            method(statistics=(Statistic(Side('output'), Mean()),)),
            ValueError,
            "needs output_mean: LinearLayer has no side 'output'",
        ),
    ):
        entry = dict(preconditioner=dict(type=kind))
        refused(
            error,
            lambda entry=entry: Preconditioned(
                model, rule=dict(type='SGDM', lr=0.1), layers=[entry]
            ),
            words,
        )


# ------------------------------------------------------------------- layers


class AllRowsAlone(LinearLayer):
    """Tells no samples apart."""

    row_kinds = Layer.row_kinds


def test_a_layer_type_of_others() -> None:
    model = MyLinear(4, 3)
    with pytest.raises(ValueError, match='found no layer'):
        NKFAC(model, lr=0.1)
    register_layer(MyLinear, LinearLayer)
    train(model, NKFAC(model, lr=0.1))
    register_layer(MyLinear, AllRowsAlone)
    train(model, NKFAC(model, lr=0.1))
    refused(
        ValueError,
        lambda: KFAC(model, lr=0.1, reduction='reduce'),
        'AllRowsAlone cannot take ReducedRows of a call',
    )


@pytest.mark.parametrize(
    'kind, layer, words',
    [
        (nn.Conv1d, Conv2dLayer, 'Conv1d is no Conv2d'),
        (nn.ConvTranspose2d, Conv2dLayer, 'ConvTranspose2d is no Conv2d'),
        (nn.Embedding, LinearLayer, 'Embedding is no Linear'),
        (nn.Conv2d, LinearLayer, 'Conv2d is no Linear'),
        (nn.Linear, nn.Linear, 'takes a subclass of Layer'),
        (dict, LinearLayer, 'is no nn.Module'),
        (nn.Linear, WindowAttention, 'use register_attention'),
    ],
)
def test_layers_that_are_refused(kind: Any, layer: Any, words: str) -> None:
    before = dict(LAYER_TYPES)
    refused(TypeError, lambda: register_layer(kind, layer), words)
    assert before == LAYER_TYPES


def test_a_class_that_is_named_is_refused_where_it_is_met() -> None:
    register_layer(qualified_name(nn.Embedding), LinearLayer)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    optimizer = NKFAC(model, lr=0.1)
    assert 'Embedding is no Linear' in optimizer.table()
    model(torch.tensor([0, 3])).square().mean().backward()
    optimizer.step()


# ------------------------------------------------------------------- attention


def test_grouped_queries_are_refused_at_construction() -> None:
    register_attention(Grouped, WindowAttention)
    model = Grouped()
    optimizer = AFOpt(model, lr=0.1)
    (reason,) = (left.reason for left in optimizer.curvature.left_out if left.kind == 'Grouped')
    assert '16 rows' in reason and 'no grouped-query attention' in reason
    model(torch.randn(2, 5, 8)).square().mean().backward()
    optimizer.step()
    refused(
        TypeError,
        lambda: register_attention(Grouped, LinearLayer),
        'takes a subclass of AttentionLayer',
    )


def test_a_rotation_keeps_its_rules_by_name() -> None:
    refused(ValueError, lambda: AdamR(nn.Linear(4, 3), lr=0.1, rule='SGDM'), 'AdamW', 'Adan')
