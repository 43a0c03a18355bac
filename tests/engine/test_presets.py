"""`Preconditioned` and the newer optimizers from MMEngine configs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.optim import AmpOptimWrapper, OptimWrapper, build_optim_wrapper
from mmengine.optim.scheduler import CosineAnnealingLR, LinearLR, MultiStepLR
from mmengine.registry import OPTIMIZERS

import mmprecond.optimizers
from mmprecond.engine import (
    CurvatureHook,
    PrecondOptimWrapperConstructor,
    constructor,
    use_optimizer,
)
from mmprecond.engine.launch import in_full_precision
from mmprecond.engine.presets import choose_optimizer
from mmprecond.optimizers import AdaAFOpt, Preconditioned
from tests.support.classifier import HalfRateConstructor, batch
from tests.support.preconditioned_configs import (
    LAYERS,
    OPTIMIZER,
    RULE,
    build,
    config,
    model,
    rates,
)
from tests.support.states import differences, everything


def test_it_is_what_the_class_itself_makes() -> None:
    ours, other = model(), model()
    before = copy.deepcopy(OPTIMIZER)
    wrapper = build(ours)
    assert OPTIMIZER == before
    assert type(wrapper.optimizer) is Preconditioned is OPTIMIZERS.get('Preconditioned')
    assert wrapper.optimizer.defaults == dict(
        lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, damping=0.01
    )
    direct = OptimWrapper(Preconditioned(other, rule=RULE, layers=LAYERS))
    for seed in range(5):
        ours.train_step(batch(seed=seed), wrapper)
        other.train_step(batch(seed=seed), direct)
    assert (
        differences(everything(ours, wrapper.optimizer), everything(other, direct.optimizer)) == []
    )


MULTIPLIERS: dict[str, tuple[dict[str, Any], dict[str, float], dict[str, float]]] = {
    'custom keys': (
        dict(
            custom_keys={'fc': dict(lr_mult=0.5, decay_mult=0.0), 'conv.bias': dict(decay_mult=3.0)}
        ),
        {'fc.weight': 0.005, 'fc.bias': 0.005},
        {'fc.weight': 0.0, 'fc.bias': 0.0, 'conv.bias': 0.3},
    ),
    'norm': (dict(norm_decay_mult=0.0), {}, {'norm.weight': 0.0, 'norm.bias': 0.0}),
    'bias': (
        dict(bias_lr_mult=2.0, bias_decay_mult=0.5),
        {'fc.bias': 0.02, 'conv.bias': 0.02},
        {'fc.bias': 0.05, 'conv.bias': 0.05, 'norm.bias': 0.05},
    ),
    'flat': (
        dict(flat_decay_mult=0.0),
        {},
        dict.fromkeys(('fc.bias', 'conv.bias', 'norm.weight', 'norm.bias'), 0.0),
    ),
}


@pytest.mark.parametrize('name', MULTIPLIERS)
def test_multipliers_reach_the_groups(name: str) -> None:
    paramwise, lrs, decays = MULTIPLIERS[name]
    ours = model()
    wrapper = build(ours, paramwise_cfg=paramwise)
    names = [n for n, _ in ours.named_parameters()]
    assert rates(wrapper, ours) == pytest.approx({**dict.fromkeys(names, 0.01), **lrs})
    assert rates(wrapper, ours, 'weight_decay') == pytest.approx(
        {**dict.fromkeys(names, 0.1), **decays}
    )
    # ... and the steps: as groups written by hand.
    other = model()
    groups = [
        dict(
            params=[p],
            lr=rates(wrapper, ours)[n],
            weight_decay=rates(wrapper, ours, 'weight_decay')[n],
        )
        for n, p in other.named_parameters()
    ]
    direct = OptimWrapper(Preconditioned(groups, model=other, rule=RULE, layers=LAYERS))
    for seed in range(4):
        ours.train_step(batch(seed=seed), wrapper)
        other.train_step(batch(seed=seed), direct)
    assert differences(ours.state_dict(), other.state_dict()) == []


def test_a_rule_without_weight_decay_has_none() -> None:
    """MMEngine's constructor asks for a decay to scale."""
    ours = model()
    wrapper = build(
        ours,
        paramwise_cfg=dict(norm_decay_mult=0.0, bias_lr_mult=2.0),
        optimizer=dict(OPTIMIZER, rule=dict(type='SGDM', lr=0.1)),
    )
    assert set(rates(wrapper, ours, 'weight_decay').values()) == {0.0}
    assert rates(wrapper, ours)['fc.bias'] == 0.2 and wrapper.optimizer.defaults['momentum'] == 0.9


def test_custom_keys_of_ours() -> None:
    ours = model()
    wrapper = build(
        ours,
        paramwise_cfg=dict(custom_keys={'conv': dict(precondition=False), 'fc': dict(damping=0.5)}),
        optimizer=dict(OPTIMIZER, layers=[dict(preconditioner=LAYERS[0]['preconditioner'])]),
    )
    assert [layer.name for layer in wrapper.optimizer.curvature.layers] == ['fc.weight']
    groups = wrapper.optimizer.param_groups
    layer = next(iter(wrapper.optimizer.curvature.layers))
    assert wrapper.optimizer.curvature.dampings.current(groups)[layer] == 0.5
    assert 'precondition=False' in wrapper.optimizer.table()


@pytest.mark.parametrize(
    'make, factor',
    [
        (
            lambda o: MultiStepLR(o, milestones=[2], by_epoch=False),
            lambda t: 0.1 if t >= 2 else 1.0,
        ),
        (
            lambda o: LinearLR(o, start_factor=0.25, end=3, by_epoch=False),
            lambda t: 0.25 + 0.75 * min(t, 2) / 2,
        ),
        (lambda o: CosineAnnealingLR(o, T_max=2, by_epoch=False), lambda t: (1.0, 0.5, 0.0)[t]),
    ],
    ids=['MultiStepLR', 'LinearLR', 'CosineAnnealingLR'],
)
def test_schedulers_change_all_rates(
    make: Callable[[OptimWrapper], Any], factor: Callable[[int], float]
) -> None:
    ours, other = model(), model()
    wrapper = build(ours, paramwise_cfg=dict(custom_keys={'fc': dict(lr_mult=0.5)}))
    by_hand = build(other, paramwise_cfg=dict(custom_keys={'fc': dict(lr_mult=0.5)}))
    scheduler = make(wrapper)
    for step in range(3):
        expected = {
            name: 0.01 * factor(step) * (0.5 if 'fc' in name else 1)
            for name, _ in ours.named_parameters()
        }
        assert rates(wrapper, ours) == pytest.approx(expected, abs=1e-12)
        for mine, theirs in zip(
            wrapper.optimizer.param_groups, by_hand.optimizer.param_groups, strict=True
        ):
            theirs.update(lr=mine['lr'], initial_lr=mine['initial_lr'])  # as a scheduler does
        ours.train_step(batch(seed=step), wrapper)
        other.train_step(batch(seed=step), by_hand)
        scheduler.step()
    assert differences(ours.state_dict(), other.state_dict()) == []


# ------------------------------------------------------------------- constructors and presets


def test_base_constructor_makes_the_groups() -> None:
    """It finds lr and decay where constructors look for them."""
    ours = model()
    wrapper = build(ours, base_constructor=HalfRateConstructor.__name__, paramwise_cfg=dict(a=1))
    assert set(rates(wrapper, ours).values()) == {0.005}
    assert len(wrapper.optimizer.param_groups) == 6
    assert {type(stack.method).__name__ for stack in wrapper.optimizer.curvature.stacks} == {
        'NewtonKronecker',
        'InputFeature',
    }
    ours.train_step(batch(), wrapper)


@pytest.mark.parametrize(
    'optimizer',
    [
        dict(type='AdaAFOpt', lr=0.01, rule='Adan', weight_decay=0.1),
        dict(type='AFOpt', lr=0.01, momentum=0.5),
        dict(type='FSGD', lr=0.01),
        dict(type='FAdam', lr=0.01, betas=[0.9, 0.99]),
    ],
    ids=lambda o: o['type'],
)
def test_the_other_optimizers(optimizer: dict[str, Any]) -> None:
    ours, other = model(), model()
    wrapper = build(
        ours, optimizer=optimizer, paramwise_cfg=dict(custom_keys={'fc': dict(lr_mult=0.5)})
    )
    assert rates(wrapper, ours)['fc.bias'] == 0.005 and rates(wrapper, ours)['conv.bias'] == 0.01
    settings = {key: value for key, value in optimizer.items() if key != 'type'}
    groups = [dict(params=[p], lr=rates(wrapper, ours)[n]) for n, p in other.named_parameters()]
    direct = OptimWrapper(
        getattr(mmprecond.optimizers, optimizer['type'])(groups, model=other, **settings)
    )
    for seed in range(3):
        ours.train_step(batch(seed=seed), wrapper)
        other.train_step(batch(seed=seed), direct)
    assert differences(ours.state_dict(), other.state_dict()) == []
    assert type(wrapper.optimizer) is not AdaAFOpt or 'betas' in wrapper.optimizer.defaults


def test_the_table_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(constructor, 'print_log', lambda text, **_: lines.append(text))
    build(model())
    text = lines[0]  # where there is a log file, a second one names the file of all modules
    assert text.startswith('mmprecond attached FSGD to 1 and NKFAC to 1 layers of Classifier')
    for part in ('conv', 'FSGD', 'fc', 'NKFAC', 'plain rule: 1 BatchNorm2d'):
        assert part in text


def test_a_preset_needs_a_list() -> None:
    cfg = Config(dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.02))))
    before = cfg.to_dict()
    with pytest.raises(ValueError, match='needs layers.*write them in the config') as caught:
        use_optimizer(cfg, 'Preconditioned')
    assert '\n' not in str(caught.value) and 'take --precondition' in str(caught.value)
    assert cfg.to_dict() == before


@pytest.mark.parametrize(
    'old',
    [
        dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-4),
        dict(type='AdamW', lr=1e-4, betas=(0.9, 0.99), weight_decay=0.05),
    ],
    ids=lambda o: o['type'],
)
@pytest.mark.parametrize('name', ['FSGD', 'FAdam', 'AFOpt', 'AdaAFOpt'])
def test_presets_of_the_new_names(name: str, old: dict[str, Any]) -> None:
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper', optimizer=dict(old))))
    use_optimizer(cfg, name)
    wrapper = build_optim_wrapper(ours := model(), cfg.optim_wrapper)
    assert type(wrapper.optimizer).__name__ == name
    assert rates(wrapper, ours)['fc.weight'] == old['lr']
    assert rates(wrapper, ours, 'weight_decay')['fc.weight'] == old['weight_decay']
    kept = 'betas' if name in ('FAdam', 'AdaAFOpt') else 'momentum'
    if kept in old:
        assert wrapper.optimizer.defaults[kept] == old[kept]


def test_a_preset_replaces_a_preconditioned_config() -> None:
    """Its rate and decay are those of the rule."""
    cfg = config()
    use_optimizer(cfg, 'FAdam')
    assert isinstance(cfg.optim_wrapper.optimizer, ConfigDict)
    assert cfg.optim_wrapper.optimizer.get('lr') == RULE['lr']
    assert cfg.optim_wrapper.optimizer.get('weight_decay') == RULE['weight_decay']


def attached_config(**more: Any) -> Config:
    return Config(
        dict(
            optim_wrapper=dict(
                constructor='mmprecond.PrecondOptimWrapperConstructor',
                precondition='NKFAC',
                clip_update=0.5,
                optimizer=dict(type='SGD', lr=0.02, momentum=0.9),
            ),
            custom_hooks=[dict(type='mmprecond.CurvatureHook'), dict(type='NumClassCheckHook')],
            **more,
        )
    )


@pytest.mark.parametrize('name', ['SGD', 'ARO', 'NKFAC', 'MAC'])
def test_options_and_hooks_follow_the_optimizer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr('mmprecond.engine.presets.print_log', lambda text, **_: said.append(text))
    cfg = attached_config()
    use_optimizer(cfg, name)
    wrapper = build_optim_wrapper(model(), cfg.optim_wrapper)
    hooks = [hook['type'].split('.')[-1] for hook in cfg.custom_hooks]
    if name in ('NKFAC', 'MAC'):
        assert wrapper.optimizer.curvature.options.clip_update == 0.5 and said == []
        added = ['CalibrationHook'] if name == 'MAC' else []
        assert hooks == ['CurvatureHook', 'NumClassCheckHook', *added]
    else:
        assert type(wrapper.optimizer).__name__ == name and hooks == ['NumClassCheckHook']
        assert any('has no clip_update' in text for text in said)
        assert any('no use for CurvatureHook' in text for text in said)


def test_a_baseline_that_gets_curvature_keeps_both(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr('mmprecond.engine.presets.print_log', lambda text, **_: said.append(text))
    cfg = attached_config()
    cfg.custom_hooks = [*cfg.custom_hooks, 'a text', dict(type=CurvatureHook)]
    choose_optimizer(cfg, 'SGD', 'NKFAC')
    assert said == [] and len(cfg.custom_hooks) == 4
    wrapper = build_optim_wrapper(model(), cfg.optim_wrapper)
    assert wrapper.optimizer.curvature.options.clip_update == 0.5


@pytest.mark.parametrize(
    'old, name, warned',
    [
        (dict(type='SGD', lr=0.1), 'AdaAct', False),
        (dict(type='SGD', lr=0.1), 'AdaFisher', True),
        (dict(type='SGD', lr=0.1), 'SOAP', True),
        (dict(type='AdamW', lr=0.1), 'AdaFisher', False),
        (dict(type='AdamW', lr=0.1), 'NKFAC', True),
        (dict(type='Preconditioned', rule=dict(type='SGDM', lr=0.1)), 'NKFAC', False),
        (dict(type='Preconditioned', rule=dict(type='AdaBelief', lr=0.1)), 'NKFAC', True),
    ],
    ids=str,
)
def test_a_rate_of_another_size_is_told(
    old: dict[str, Any], name: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr('mmprecond.engine.presets.print_log', lambda text, **_: said.append(text))
    use_optimizer(Config(dict(optim_wrapper=dict(optimizer=old))), name)
    assert any('a rule of another kind' in text for text in said) == warned


def test_classes_in_place_of_names() -> None:
    """As in configs that are Python modules."""

    def with_classes() -> Config:
        optimizer = dict(type=torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
        kinds = dict(type=OptimWrapper, constructor=PrecondOptimWrapperConstructor)
        return Config(dict(optim_wrapper=dict(**kinds, optimizer=optimizer)))

    baseline = with_classes()
    choose_optimizer(baseline, 'SGD', None)
    wrapper = build_optim_wrapper(model(), baseline.optim_wrapper)
    assert type(wrapper.optimizer) is torch.optim.SGD
    assert wrapper.optimizer.defaults['nesterov']
    attached = with_classes()
    choose_optimizer(attached, None, 'NKFAC')
    assert 'base_constructor' not in attached.optim_wrapper
    wrapper = build_optim_wrapper(model(), attached.optim_wrapper)
    assert type(wrapper.optimizer) is Preconditioned
    full = in_full_precision(dict(type=AmpOptimWrapper, loss_scale=1.0))
    assert full['type'] == 'OptimWrapper'
