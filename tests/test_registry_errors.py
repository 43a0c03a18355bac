"""Registrations that do not go together, and incomplete ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from mmprecond.curvature import (
    GRADIENT,
    INPUT,
    REDUCED,
    AttentionLayer,
    AttentionReading,
    Blocks,
    Columns,
    CountedMean,
    Layer,
    LinearLayer,
    Mean,
    Moment,
    PackedAttention,
    Sketch,
    Statistic,
    WindowAttention,
    register_attention,
    register_layer,
)
from mmprecond.curvature.attention import QUERY_MOMENT
from mmprecond.curvature.statistic import ReducedRows
from mmprecond.optimizers import SGDPH, AFOpt, Preconditioned
from mmprecond.preconditioners import CalibratedInput, register_preconditioner
from mmprecond.rules import register_rule
from tests.support.errors import refused
from tests.support.registered import Grouped, InputScale, MyLinear, SignSGD, method

pytestmark = pytest.mark.usefixtures('registries_as_they_were')


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
        ((), ValueError, 'has no statistic for a LinearLayer'),
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
