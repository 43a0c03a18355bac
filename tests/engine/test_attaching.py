"""`precondition` in optim_wrapper: the config's own optimizer stays, as the rule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper, OptimWrapper, build_optim_wrapper
from torch import nn

from mmprecond import Preconditioned, RuleOptimizer
from mmprecond.engine import attach as add_curvature
from mmprecond.engine import use_optimizer
from mmprecond.optimizers.replacement import rule_for
from mmprecond.rules import build_rule
from tests.support.classifier import Classifier, batch

ADAMW = dict(type='AdamW', lr=2e-3, betas=(0.8, 0.95))


def attach(model: nn.Module, optimizer: dict[str, Any], **cfg: Any) -> OptimWrapper:
    cfg = dict(constructor='PrecondOptimWrapperConstructor', optimizer=optimizer, **cfg)
    return build_optim_wrapper(model, cfg)


def train(optimizer: dict[str, Any], steps: int = 6, **cfg: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Classifier()
    wrapper = attach(model, optimizer, **cfg)
    for seed in range(steps):
        model.train_step(batch(seed=seed), wrapper)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ('optimizer', 'rule'),
    [
        (ADAMW, dict(ADAMW, weight_decay=0.01, eps=1e-8)),  # torch's default decay
        (dict(type='SGD', lr=0.1), dict(type='SGDM', lr=0.1, momentum=0, weight_decay=0)),
        (
            dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-3, _scope_='mmengine'),
            dict(type='SGDM', lr=0.1, momentum=0.9, weight_decay=1e-3),
        ),
        (dict(type='Adam', lr=1e-3), dict(type='AdamW', lr=1e-3, weight_decay=0.0)),
    ],
)
@pytest.mark.parametrize(
    'cfg',
    [
        {},
        dict(accumulative_counts=2),
        dict(clip_grad=dict(max_norm=1.0)),
        dict(paramwise_cfg=dict(custom_keys=dict(conv=dict(lr_mult=0.1)))),
    ],
)
def test_it_equals_the_same_written_out(
    optimizer: dict[str, Any], rule: dict[str, Any], cfg: dict[str, Any]
) -> None:
    attached = train(optimizer, precondition='NKFAC', **cfg)
    layers = [dict(preconditioner=dict(type='NewtonKronecker'))]
    written = train(dict(type='Preconditioned', rule=rule, layers=layers), **cfg)
    assert all(map(torch.equal, attached, written))
    assert not all(map(torch.equal, attached, train(optimizer, **cfg)))


def test_nothing_is_attached_without_a_word() -> None:
    plain = train(ADAMW)
    assert all(map(torch.equal, plain, train(ADAMW, precondition=None)))
    assert type(attach(Classifier(), ADAMW, precondition=None).optimizer) is torch.optim.AdamW


@pytest.mark.parametrize(
    ('kind', 'settings'),
    [
        (torch.optim.SGD, dict(lr=0.1)),
        (torch.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.1)),
        (torch.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)),
        (torch.optim.Adam, dict(lr=0.1, betas=(0.7, 0.9), eps=1e-4)),
        (torch.optim.AdamW, dict(lr=0.1)),
        (torch.optim.AdamW, dict(lr=0.1, weight_decay=0.3, fused=False)),
    ],
)
def test_rules_update_as_the_optimizers_that_they_replace(
    kind: type[torch.optim.Optimizer], settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    one, other = (nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(2))
    pairs = [
        (one, kind([one], **settings)),
        (other, RuleOptimizer([other], *build_rule(rule_for(kind, settings)))),
    ]
    for _ in range(5):
        gradient = torch.randn(5, dtype=torch.float64)
        for parameter, optimizer in pairs:
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_config_keeps_its_constructor() -> None:
    cfg = Config(
        dict(
            optim_wrapper=dict(
                optimizer=ADAMW,
                constructor='HalfRateConstructor',
                paramwise_cfg=dict(a=1),
            ),
            paper={},
        )
    )
    add_curvature(cfg, 'NKFAC')
    wrapper = build_optim_wrapper(Classifier(), cfg.optim_wrapper)
    assert isinstance(wrapper.optimizer, Preconditioned) and 'paper' not in cfg
    rates = {group['lr'] for group in wrapper.optimizer.param_groups}
    assert 1e-3 in rates  # half of the config's
    with pytest.raises(ValueError, match='no optim_wrapper.optimizer to add curvature to'):
        add_curvature(Config(dict(model={})), 'NKFAC')


@pytest.mark.parametrize('name', ['AdamW', 'SGD', 'NKFAC'])
def test_another_optimizer_replaces_what_was_attached(name: str) -> None:
    cfg = Config(dict(optim_wrapper=dict(optimizer=dict(ADAMW, weight_decay=0.1))))
    add_curvature(cfg, 'NKFAC')
    use_optimizer(cfg, name)
    built = build_optim_wrapper(Classifier(), cfg.optim_wrapper).optimizer
    assert type(built).__name__ == name


def test_the_wrapper_and_forms_of_the_value(amp_on_cpu: None) -> None:
    wrapper = attach(Classifier(), ADAMW, precondition='NKFAC', type='AmpOptimWrapper')
    assert isinstance(wrapper, AmpOptimWrapper) and isinstance(wrapper.optimizer, Preconditioned)
    forms: list[Any] = [
        dict(elsewhere=dict(type='NKFAC', damping=0.02)),
        [dict(preconditioner=dict(type='NKFAC', damping=0.02))],
    ]
    for form in forms:
        given = copy.deepcopy(form)
        optimizer = attach(Classifier(), ADAMW, precondition=form).optimizer
        assert optimizer.curvature.stacks[0].method.damping == 0.02 and form == given


@pytest.mark.parametrize(
    ('optimizer', 'precondition', 'message'),
    [
        (dict(type='SGD', lr=0.1, momentum=0.9, dampening=0.1), 'NKFAC', 'leave dampening out'),
        (dict(type='AdamW', lr=0.1, amsgrad=True), 'NKFAC', 'amsgrad=True'),
        (dict(type='Adam', lr=0.1, weight_decay=0.1), 'NKFAC', "take type='AdamW'"),
        (dict(type='RMSprop', lr=0.1), 'NKFAC', 'RMSprop cannot be a rule .* SGD, Adam, AdamW'),
        (dict(type='NKFAC', lr=0.1), 'NKFAC', 'leave precondition out'),
        (dict(type='SGD', lr=0.1), 'NFKAC', "unknown preconditioner type 'NFKAC'; did you mean"),
        (dict(lr=0.1), 'NKFAC', 'needs optimizer=dict'),
    ],
)
def test_mistakes_take_one_line(optimizer: dict[str, Any], precondition: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        attach(Classifier(), optimizer, precondition=precondition)
    assert '\n' not in str(caught.value)
