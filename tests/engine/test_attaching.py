"""`precondition` in optim_wrapper: the config's own optimizer stays, as the rule."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import (
    AmpOptimWrapper,
    DefaultOptimWrapperConstructor,
    OptimWrapper,
    build_optim_wrapper,
)
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from mmprecond import Preconditioned, RuleOptimizer, engine
from mmprecond.engine import attach as add_curvature
from mmprecond.engine import use_optimizer
from mmprecond.optimizers.replacement import rule_for
from mmprecond.rules import build_rule
from tests.support.classifier import Classifier, batch
from tests.support.classifier import build as build_wrapper
from tests.support.mixed import Net

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
    plain = train(optimizer, precondition=None, **cfg)
    assert not all(map(torch.equal, attached, plain))


def test_none_is_exactly_the_base_constructor() -> None:
    weights = []
    for constructor in ('PrecondOptimWrapperConstructor', 'DefaultOptimWrapperConstructor'):
        torch.manual_seed(0)
        model = Classifier()
        cfg = dict(constructor=constructor, optimizer=ADAMW)
        if 'Precond' in constructor:
            cfg['precondition'] = None
        wrapper = build_optim_wrapper(model, cfg)
        assert type(wrapper) is OptimWrapper and type(wrapper.optimizer) is torch.optim.AdamW
        for seed in range(4):
            model.train_step(batch(seed=seed), wrapper)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *weights))


def test_the_constructor_alone_attaches_both_methods(capsys: pytest.CaptureFixture[str]) -> None:
    model = Net()
    optimizer = attach(model, ADAMW).optimizer
    assert {
        layer.name: stack.method.title for layer, stack in optimizer.curvature.layers.items()
    } == {
        'patch.weight': 'NKFAC',
        'head.weight': 'NKFAC',
        **{
            f'blocks.{k}.{name}.weight': 'AFOpt' if 'attn' in name else 'NKFAC'
            for k in range(2)
            for name in ('attn.qkv', 'attn.proj', 'ffn.up', 'ffn.down')
        },
    }
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    plain = sum(n for name, n in sizes.items() if 'norm' in name or name[-8:] == 'qkv.bias')
    share = 100 * (1 - plain / sum(sizes.values()))
    assert re.fullmatch(
        rf'mmprecond attached NKFAC to 6 and AFOpt to 4 layers of Net, which hold {share:.1f} % of '
        r'0.00 M trained '
        r'parameters; forecast cost: [\d.e-]+ GFLOP a step without captures, 0 MB, and 0 MB more '
        'during a refresh; 2 modules take the plain rule',
        optimizer.summary(),
    )
    assert all(map(torch.equal, train(ADAMW), train(ADAMW, precondition='AFOpt+NKFAC')))


@pytest.mark.parametrize('kind', ['OptimWrapper', 'AmpOptimWrapper'])
def test_wrappers_have_names_of_their_own(kind: str, amp_on_cpu: None) -> None:
    settings: dict[str, Any] = dict(dtype='bfloat16') if 'Amp' in kind else {}
    built = [
        attach(Classifier(), ADAMW, type=prefix + kind, **settings) for prefix in ('', 'Precond')
    ]
    assert type(built[0]) is type(built[1]) is getattr(engine, f'Precond{kind}')
    plain = dict(type=f'Precond{kind}', optimizer=ADAMW)
    with pytest.raises(TypeError, match='is for optimizers that precondition, not for AdamW'):
        build_optim_wrapper(Classifier(), plain)
    with pytest.raises(TypeError, match="write type='OptimWrapper' or 'AmpOptimWrapper'"):
        attach(Classifier(), ADAMW, type=f'Precond{kind}', precondition=None)
    with pytest.raises(ValueError, match=f'Precond{kind} is not for SGDPH'):
        attach(Classifier(), dict(type='SGDPH', lr=0.1), type=f'Precond{kind}')


# ------------------------------------------------------------------- a toolbox's own constructor


class Decaying(DefaultOptimWrapperConstructor):
    """Layer decay, as toolboxes have it."""

    def add_params(self, params: list, module: nn.Module, **kwargs: Any) -> None:
        factor = self.paramwise_cfg.get('test_decay_rate')
        params += [dict(params=[p], lr=self.base_lr * factor) for p in module.parameters()]


class Deprecated(Decaying):
    """A second name."""


class Same(DefaultOptimWrapperConstructor):
    def add_params(self, *args: Any, **kwargs: Any) -> None:
        self.paramwise_cfg['test_decay_rate']


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def register(*kinds: type) -> None:
        for kind in kinds:
            monkeypatch.setitem(OPTIM_WRAPPER_CONSTRUCTORS.module_dict, kind.__name__, kind)

    return register


@pytest.mark.parametrize('precondition', ['NKFAC', None])
def test_the_constructor_that_reads_paramwise_cfg_is_found(
    precondition: str | None, registered: Callable[..., None]
) -> None:
    registered(Decaying, Deprecated)
    paramwise = dict(test_decay_rate=0.5, custom_keys={})
    wrapper = attach(Classifier(), ADAMW, paramwise_cfg=paramwise, precondition=precondition)
    assert {group['lr'] for group in wrapper.optimizer.param_groups} == {1e-3}


@pytest.mark.parametrize('kinds', [(), (Decaying, Same)])
def test_a_key_that_no_constructor_reads(
    kinds: tuple[type, ...], registered: Callable[..., None]
) -> None:
    registered(*kinds)
    names = ', '.join(kind.__name__ for kind in kinds) or 'none is registered'
    text = f'ignores test_decay_rate of paramwise_cfg; name .* base_constructor.*{names}'
    with pytest.raises(ValueError, match=text):
        attach(Classifier(), ADAMW, paramwise_cfg=dict(test_decay_rate=0.5))
    if kinds:
        named = dict(base_constructor='Decaying', paramwise_cfg=dict(test_decay_rate=0.5))
        assert attach(Classifier(), ADAMW, **named).optimizer.param_groups[0]['lr'] == 1e-3


class Popping(DefaultOptimWrapperConstructor):
    """Takes the weight decay out of the optimizer's config when it is called."""

    def __call__(self, model: nn.Module) -> OptimWrapper:
        decay = self.optimizer_cfg.pop('weight_decay', 0)
        wrapper = super().__call__(model)
        for group in wrapper.optimizer.param_groups:
            group['weight_decay'] = 2 * decay
        self.optimizer_cfg['weight_decay'] = decay
        return wrapper


@pytest.mark.parametrize('precondition', ['NKFAC', None])
def test_a_constructor_that_reads_the_decay_when_it_is_called(
    precondition: str | None, registered: Callable[..., None]
) -> None:
    registered(Popping)
    optimizer = attach(
        Classifier(),
        dict(ADAMW, weight_decay=0.3),
        base_constructor='Popping',
        precondition=precondition,
    ).optimizer
    assert {group['weight_decay'] for group in optimizer.param_groups} == {0.6}


@pytest.mark.parametrize(
    ('optimizer', 'settings', 'message'),
    [
        (dict(type='Adam', lr=0.1), dict(weight_decay=0.1), 'Adam with weight_decay=0.1'),
        (ADAMW, dict(amsgrad=True), 'has amsgrad=True, which Preconditioned does not read'),
        (
            dict(type='SGD', lr=0.1, momentum=0.9),
            dict(nesterov=True),
            'has nesterov, which all groups have in common',
        ),
        (
            dict(type='SGD', lr=0.1, momentum=0.9),
            dict(dampening=0.1),
            'has dampening=0.1, which Preconditioned does not read',
        ),
    ],
)
def test_settings_of_groups_that_no_rule_has(
    optimizer: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    paramwise = dict(custom_keys=dict(conv=settings))
    with pytest.raises(ValueError, match=message):
        attach(Classifier(), optimizer, paramwise_cfg=paramwise)
    attach(Classifier(), optimizer, paramwise_cfg=dict(custom_keys=dict(conv=dict(lr_mult=0.1))))


def test_a_typing_error_in_the_key() -> None:
    with pytest.raises(ValueError, match='optim_wrapper has preconditon; did you mean precond'):
        attach(Classifier(), ADAMW, preconditon='NKFAC')


def test_options_stand_beside_precondition() -> None:
    optimizer = attach(Classifier(), ADAMW, overhead=0.05, clip_update=1.0).optimizer
    assert optimizer.curvature.options.overhead == 0.05
    assert optimizer.curvature.options.clip_update == 1.0
    for wrong in (dict(optimizer=dict(type='NKFAC', lr=0.1)), dict(optimizer=ADAMW)):
        rest = {} if wrong['optimizer'] is not ADAMW else dict(precondition=None)
        with pytest.raises(ValueError, match='optim_wrapper has overhead, which goes with precond'):
            attach(Classifier(), **wrong, overhead=0.05, **rest)


# ------------------------------------------------------------------- rules


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


@pytest.mark.parametrize('dotted', ['', 'mmprecond.'])
@pytest.mark.parametrize('name', ['AdamW', 'SGD', 'NKFAC'])
def test_another_optimizer_replaces_what_was_attached(name: str, dotted: str) -> None:
    cfg = Config(dict(optim_wrapper=dict(optimizer=dict(ADAMW, weight_decay=0.1))))
    if dotted:
        cfg.optim_wrapper.constructor = f'{dotted}PrecondOptimWrapperConstructor'
    else:
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
        (dict(type='AdamW', lr=0.1, amsgrad=True), 'NKFAC', 'amsgrad=True.*precondition=None'),
        (dict(type='Adam', lr=0.1, weight_decay=0.1), 'NKFAC', "take type='AdamW'"),
        (dict(type='RMSprop', lr=0.1), 'NKFAC', 'RMSprop cannot be a rule .* SGD, Adam, AdamW'),
        (dict(type='NKFAC', lr=0.1), 'NKFAC', 'leave precondition out'),
        (dict(type='SGD', lr=0.1), 'NFKAC', "unknown preconditioner type 'NFKAC'; did you mean"),
        (dict(lr=0.1), 'NKFAC', 'has no optimizer to precondition; write'),
    ],
)
def test_mistakes_take_one_line(optimizer: dict[str, Any], precondition: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        attach(Classifier(), optimizer, precondition=precondition)
    assert '\n' not in str(caught.value)


def test_custom_keys_must_fit_a_parameter() -> None:
    keys = dict(convv=dict(precondition=False))
    with pytest.raises(ValueError, match="custom_keys has 'convv', which .*; did you mean conv"):
        build_wrapper(Classifier(), paramwise_cfg=dict(custom_keys=keys))
    settings = dict(convv=dict(lr_mult=0.1))  # MMEngine's alone
    build_wrapper(Classifier(), paramwise_cfg=dict(custom_keys=settings))
