"""list_optimizers, get_optimizer_info, signatures and print(optimizer)."""

from __future__ import annotations

import inspect
import pydoc
from typing import Any

import pytest
import torch
from torch import nn

import mmprecond
from mmprecond import optimizers
from mmprecond.optimizers import (
    ARO,
    NKFAC,
    SOAP,
    AdaNKFAC,
    Preconditioned,
    Shampoo,
    get_optimizer_info,
    list_optimizers,
)


def test_names() -> None:
    names = list_optimizers()
    assert names == sorted(names) and {'NKFAC', 'AdamR', 'SOAA', 'ARO', 'Preconditioned'} <= set(
        names
    )
    assert 'PreconditionedOptimizer' not in names and 'WeightNormConv2d' not in names
    assert list_optimizers('*nkfac') == ['AdaNKFAC', 'NKFAC']
    assert mmprecond.list_optimizers is list_optimizers


@pytest.mark.parametrize('name', list_optimizers())
def test_what_is_known_of_each(name: str) -> None:
    info = get_optimizer_info(name.lower())
    assert info.name == name and info.kind is getattr(optimizers, name)
    assert info.description.endswith('.') and info.needs in (
        '',
        'capture',
        'graph',
        'loss',
        'length',
    )
    assert 'params' not in info.settings
    assert 'settings' in info.settings or not info.published
    if name not in ('Preconditioned', 'ARO', 'DCTAdamW', 'RAMDA', 'SGDPH', 'SOAA'):
        assert {'stat_interval', 'overhead'} <= set(info.settings)
        assert 'given' not in info.settings and 'model' in info.settings


def test_defaults_are_those_of_the_optimizer() -> None:
    info = get_optimizer_info('AdaNKFAC')
    assert info.settings['stat_interval'] == 100 and info.settings['overhead'] is None
    assert info.settings['lr'] is inspect.Parameter.empty
    assert info.published['solver'] == 'newton' and info.published['stat_interval'] == 100
    model = nn.Linear(3, 2)
    method = AdaNKFAC(model, lr=0.1).curvature.stacks[0].method
    for key in method.options():
        assert getattr(method, key) == info.settings[key], key


@pytest.mark.parametrize(('kind', 'own'), [(SOAP, 'betas'), (Shampoo, 'momentum')])
def test_published_settings_give_the_published_optimizer(kind: Any, own: str) -> None:
    published = get_optimizer_info(kind.__name__).published
    assert own in published and published['matmul_precision'] == 'highest'
    model = nn.Linear(3, 2)
    by_name = kind(model, lr=0.1, settings='published')
    by_hand = kind(model, lr=0.1, **published)
    assert by_name.curvature.stacks[0].method == by_hand.curvature.stacks[0].method
    assert by_name.curvature.options == by_hand.curvature.options
    assert by_name.defaults == by_hand.defaults
    assert by_name.defaults[own] == published[own] != kind(model, lr=0.1).defaults[own]


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match='unknown optimizer .NKFA.; did you mean NKFAC'):
        get_optimizer_info('NKFA')
    nothing: Any = None
    with pytest.raises(ValueError, match='unknown optimizer None'):
        get_optimizer_info(nothing)


def test_signatures_name_every_setting() -> None:
    assert 'damping' in inspect.signature(NKFAC).parameters
    assert 'overhead' in inspect.signature(Preconditioned).parameters
    parameters = inspect.signature(NKFAC).parameters
    assert list(parameters)[:4] == ['params', 'lr', 'momentum', 'weight_decay']
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
    assert 'refresh_interval=200' in pydoc.plain(pydoc.render_doc(NKFAC))
    for name, parameter in parameters.items():  # each is taken
        if name not in ('params', 'model', 'lr', 'max_rank', 'overhead', 'clip_update'):
            NKFAC(nn.Linear(3, 2), lr=0.1, **{name: parameter.default})


def test_print() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    groups = [
        dict(params=[p], weight_decay=0.0 if p.dim() < 2 else 0.1) for p in model.parameters()
    ]
    text = repr(NKFAC(groups, model=model, lr=0.5))
    assert text.splitlines() == [
        'NKFAC:',
        '  NKFAC on 2 layers: captures every 20 steps, refreshes every 200',
        '  rule SGDM, 0 steps taken',
        '  2 parameters: weight_decay 0.1, lr 0.5, momentum 0.9, damping 0.01',
        '  4 parameters: weight_decay 0.0, lr 0.5, momentum 0.9, damping 0.01',
    ]
    matrix = nn.Parameter(torch.zeros(3, 3))
    assert repr(ARO([matrix], lr=0.1)).splitlines()[:2] == ['ARO:', '  rule ARORule, 0 steps taken']
