"""Rules, preconditioners, layers and attention modules of others: registered, used, or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from mmprecond.curvature import (
    GRADIENT,
    INPUT,
    LAYER_TYPES,
    REDUCED,
    AttentionLayer,
    AttentionReading,
    Blocks,
    Columns,
    Conv2dLayer,
    CountedMean,
    Layer,
    LinearLayer,
    Mean,
    Moment,
    PackedAttention,
    RunningAverage,
    Side,
    Sketch,
    Statistic,
    WindowAttention,
    qualified_name,
    register_attention,
    register_layer,
)
from mmprecond.curvature.attention import QUERY_MOMENT
from mmprecond.curvature.statistic import ReducedRows
from mmprecond.linalg import Diagonal, Operators
from mmprecond.optimizers import KFAC, NKFAC, SGDPH, AdamR, AFOpt, Preconditioned
from mmprecond.preconditioners import (
    METHODS,
    CalibratedInput,
    Preconditioner,
    register_preconditioner,
)
from mmprecond.rules import RULES, AdamW, Rule, register_rule
from tests.support.errors import refused

pytestmark = pytest.mark.usefixtures('registries_as_they_were')


# ------------------------------------------------------------------- rules


class SignSGD(Rule):
    hyper = ('lr', 'weight_decay')
    defaults = dict(weight_decay=0.0)

    def compute_updates(
        self, params: Any, directions: list[Tensor], states: Any, group: Any
    ) -> list[Tensor]:
        return [direction.sign() for direction in directions]

    def apply_updates(
        self, params: list[Tensor], updates: list[Tensor], states: Any, group: Any
    ) -> None:
        torch._foreach_add_(params, updates, alpha=-group['lr'])


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
        'EigenRotation does not work with the rule SignSGD',
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


@dataclass(frozen=True, kw_only=True)
class InputScale(Preconditioner):
    """G times the diagonal of R."""

    statistics: ClassVar[tuple[Statistic, ...]] = (Statistic(INPUT, Moment()),)

    def average(self) -> RunningAverage:
        return RunningAverage(0.0)

    def outline(self, layer: Layer) -> Operators:
        blocks, _, columns = layer.shape
        return {'input': Diagonal.outline((blocks, 1, columns))}

    def refresh(self, factors: Any, previous: Any, damping: Any) -> Any:
        diagonal = factors[INPUT].tensor.diagonal(dim1=-2, dim2=-1)[:, :, None]
        return {'input': Diagonal(diagonal.clone())}, diagonal.isfinite().flatten(1).all(1)

    def apply(self, operators: Operators, gradients: Tensor) -> Tensor:
        return operators['input'].right(gradients)


def test_a_preconditioner_of_others() -> None:
    register_preconditioner(InputScale)
    model = nn.Linear(4, 3, bias=False)
    optimizer = Preconditioned(
        model,
        rule=dict(type='SGDM', lr=0.1, momentum=0.0),
        layers=[dict(preconditioner=dict(type='InputScale', stat_interval=1, refresh_interval=1))],
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


def method(name: str = 'Other', **members: Any) -> type:
    return dataclass(frozen=True, kw_only=True)(type(name, (InputScale,), members))


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


class MyLinear(nn.Linear):
    """Computes what its base class does."""


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


class Grouped(nn.Module):
    """Grouped-query attention: two heads of queries share one of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(8, 8 + 2 * 4)
        self.softmax = nn.Softmax(-1)
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([8, 4, 4], -1)
        q = q.unflatten(-1, (2, 4)).transpose(1, 2)
        out = self.softmax(q @ k[:, None].mT) @ v[:, None]
        return self.proj(out.transpose(1, 2).flatten(2))


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


# ------------------------------------------------------------------- what does not go together


@pytest.mark.parametrize(
    'make, words',
    [
        (lambda: Statistic(INPUT, Moment), 'form=Moment is a class; write form=Moment()'),
        (lambda: Statistic(INPUT, Moment(), ReducedRows), 'rows=ReducedRows is a class'),
        (lambda: Statistic('input', Moment()), 'takes a Side, such as INPUT'),
    ],
)
def test_statistics_that_cannot_be_written(make: Callable[[], Any], words: str) -> None:
    refused(TypeError, make, words)


@pytest.mark.parametrize(
    'make', [lambda: Columns(0), lambda: Blocks(0), lambda: Sketch(0), lambda: Sketch(3, 'other')]
)
def test_forms_that_cannot_be_written(make: Callable[[], Any]) -> None:
    refused(ValueError, make, '=')


@pytest.mark.parametrize(
    'statistics, error, words',
    [
        (Statistic(INPUT, Mean()), TypeError, 'is no tuple'),
        (
            (Statistic(INPUT, Moment()), Statistic(INPUT, Mean())),
            ValueError,
            'two statistics of one',
        ),
        (
            (Statistic(INPUT, Moment()), Statistic(GRADIENT, Moment(), REDUCED)),
            ValueError,
            'over different rows',
        ),
        ((), ValueError, 'measures nothing of a LinearLayer'),
        ((Statistic(INPUT, Mean(), REDUCED),), ValueError, 'Mean is taken of all rows'),
        ((Statistic(INPUT, CountedMean()),), ValueError, 'CountedMean is not a form of input'),
        ((QUERY_MOMENT,), ValueError, "no side 'query'"),
    ],
)
def test_statistics_that_do_not_go_together(
    statistics: Any, error: type[Exception], words: str
) -> None:
    entry = dict(preconditioner=dict(type=method(statistics=statistics)))
    refused(
        error,
        lambda: Preconditioned(nn.Linear(4, 3), rule=dict(type='SGDM', lr=0.1), layers=[entry]),
        words,
    )


def test_attention_has_the_forms_that_its_sides_are_declared_with() -> None:
    class Whole(method(statistics=())):  # type: ignore[misc]
        attention_reading = AttentionReading()

        def candidate_statistics(self, layer: Layer) -> tuple[Statistic, ...]:
            return (Statistic(QUERY_MOMENT.side, Sketch(1)),)

    entry = dict(preconditioner=dict(type=Whole))
    refused(
        ValueError,
        lambda: Preconditioned(
            nn.MultiheadAttention(8, 2), rule=dict(type='SGDM', lr=0.1), layers=[entry]
        ),
        "its side 'query' has the form Moment alone",
    )


class NoRows(Layer):
    """Says nothing."""


class NoSamples(Layer):
    """Promises samples and does not tell them."""

    row_kinds = LinearLayer.row_kinds
    input_rows, gradient_rows = LinearLayer.input_rows, LinearLayer.gradient_rows


@pytest.mark.parametrize(
    'kind, layer, words',
    [
        (MyLinear, NoRows, 'must define input_rows, gradient_rows'),
        (MyLinear, NoSamples, 'must define reduced_input, reduced_gradient, sample_count'),
        (None, LinearLayer, 'None is no nn.Module'),
        (5, LinearLayer, '5 is no nn.Module'),
        (nn.Linear(3, 2), LinearLayer, 'is no nn.Module'),
        ('Linear', LinearLayer, "'Linear' is no"),
    ],
)
def test_layers_that_are_incomplete(kind: Any, layer: Any, words: str) -> None:
    refused(TypeError, lambda: register_layer(kind, layer), words)


def test_attention_that_is_incomplete() -> None:
    refused(TypeError, lambda: register_attention(5, WindowAttention), '5 is no nn.Module')
    refused(TypeError, lambda: register_attention(Grouped, AttentionLayer), 'must define read')
    register_attention(MyLinear, PackedAttention)
    optimizer = AFOpt(nn.Sequential(MyLinear(4, 3), nn.Linear(3, 2)), lr=0.1)
    assert 'MyLinear is no MultiheadAttention' in optimizer.table()


def test_names_that_are_none() -> None:
    refused(TypeError, lambda: register_rule(SignSGD, name=5), 'name=5 is no name')
    refused(TypeError, lambda: register_preconditioner(InputScale, name=''), "name='' is no name")
    refused(TypeError, lambda: SGDPH(nn.BatchNorm1d(3), lr=0.1, foo=1), 'foo', '_delete_=True')
    refused(
        ValueError,
        lambda: Preconditioned(
            nn.Linear(4, 3),
            rule=dict(type='SGDM', lr=0.1),
            layers=[dict(preconditioner=dict(type=CalibratedInput))],
        ),
        'is never measured',
    )
