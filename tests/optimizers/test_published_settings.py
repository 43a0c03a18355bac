"""``settings='published'``: the literal settings of a source, whatever the defaults are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from mmprecond import optimizers
from mmprecond.engine.registration import optimizer_types
from mmprecond.optimizers import SOAA, PreconditionedOptimizer
from mmprecond.preconditioners import METHODS
from tests.support.errors import refused

NAMED = sorted(kind.__name__ for kind in optimizer_types() if kind.__name__ != 'Preconditioned')
#: Of solvers that no source has.
OURS = {'tolerance', 'rank_share'}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3))


def make(name: str, **settings: Any) -> Any:
    kind = getattr(optimizers, name)
    more = dict(total_steps=5) if kind is SOAA else {}
    return kind(net(), lr=0.1, **more, **settings)


@pytest.mark.parametrize('name', METHODS)
def test_it_says_all_that_its_source_says(name: str) -> None:
    kind = METHODS[name]
    assert set(kind.options()) - set(kind.published) == OURS & set(kind.options())
    assert set(kind.published) <= set(kind.options())
    kind(**kind.published)


@pytest.mark.parametrize('name', NAMED)
def test_defaults_do_not_reach_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other defaults, the published settings are what they were."""

    def settings_of(optimizer: Any) -> Any:
        if isinstance(optimizer, PreconditionedOptimizer):
            return {stack.method for stack in optimizer.curvature.stacks}
        rule = {
            key: value
            for key, value in vars(optimizer.rule).items()
            if isinstance(value, (int, float, str))
        }
        return optimizer.defaults, rule

    before = settings_of(make(name, settings='published'))
    kind = getattr(optimizers, name)
    method = getattr(kind, 'preconditioner', None)
    if method is not None:  # defaults of a dataclass are those of its constructor
        plain = method.__init__
        monkeypatch.setattr(
            method,
            '__init__',
            lambda self, **given: plain(
                self, **{'stat_interval': 7, 'refresh_interval': 21, 'max_dim': 99} | given
            ),
        )
        monkeypatch.setattr(kind, 'preset', {})
        assert settings_of(make(name)) != before or name == 'SMAC'
    assert settings_of(make(name, settings='published')) == before


@pytest.mark.parametrize('name', NAMED)
def test_single_keys_override_and_other_names_are_refused(name: str) -> None:
    kind = getattr(optimizers, name)
    published = make(name, settings='published')
    if isinstance(published, PreconditionedOptimizer):
        (method,) = {stack.method for stack in published.curvature.stacks}
        other = make(name, settings='published', stat_interval=1, refresh_interval=3)
        assert {stack.method for stack in other.curvature.stacks} == {
            replace(method, stat_interval=1, refresh_interval=3)
        }
    else:
        assert 'eps' in kind.published
        other = make(name, settings='published', eps=0.25)
        assert 0.25 in (other.defaults.get('eps'), getattr(other.rule, 'eps', None))
    refused(ValueError, lambda: make(name, settings='thesis'), 'settings=', 'default, published')


def test_entries_of_layers_take_it() -> None:
    optimizer = optimizers.Preconditioned(
        net(),
        rule=dict(type='SGDM', lr=0.1),
        layers=[
            dict(
                match=dict(name='0'),
                preconditioner=dict(type='ActivationMean', settings='published'),
            ),
            dict(preconditioner=dict(type='NewtonKronecker', settings='published', damping=0.5)),
        ],
    )
    first, second = (stack.method for stack in optimizer.curvature.stacks)
    assert (first.compat, first.gradient_scale) == ('official', 'none')
    assert second == METHODS['NewtonKronecker'](
        **{**METHODS['NewtonKronecker'].published, 'damping': 0.5}
    )


def test_positional_arguments_count_as_given() -> None:
    model = net()
    optimizer = optimizers.ARO(model.parameters(), 0.1, 0.5, settings='published')
    assert optimizer.defaults['momentum'] == 0.5
    assert torch.isfinite(torch.tensor(optimizer.defaults['lr']))
