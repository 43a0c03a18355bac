"""`Preconditioned` and the newer optimizers from MMEngine configs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.optim.scheduler import CosineAnnealingLR, LinearLR, MultiStepLR
from mmengine.registry import OPTIMIZERS

import mmprecond.optimizers
from mmprecond.engine import constructor, use_optimizer
from mmprecond.optimizers import AdaAFOpt, Preconditioned
from tests.support.classifier import Classifier, batch
from tests.support.paths import ROOT
from tests.support.states import differences, everything

RULE = dict(type='AdamW', lr=0.01, weight_decay=0.1)
LAYERS = [
    dict(
        match=dict(name='fc'),
        preconditioner=dict(type='NewtonKronecker', stat_interval=1, refresh_interval=2),
    ),
    dict(
        match=dict(module_type=['Conv2d']),
        preconditioner=dict(type='InputFeature', stat_interval=2, refresh_interval=2),
    ),
]
OPTIMIZER = dict(type='Preconditioned', rule=RULE, layers=LAYERS)


def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier()


def build(built: Classifier, **cfg: Any) -> OptimWrapper:
    given = dict(constructor='PrecondOptimWrapperConstructor', optimizer=OPTIMIZER) | cfg
    return build_optim_wrapper(built, given)


def rates(wrapper: OptimWrapper, built: Classifier, key: str = 'lr') -> dict[str, float]:
    """A setting of each parameter by name."""
    names = {p: name for name, p in built.named_parameters()}
    return {
        names[p]: group[key] for group in wrapper.optimizer.param_groups for p in group['params']
    }


def test_it_is_what_the_class_itself_makes() -> None:
    ours, other = model(), model()
    before = copy.deepcopy(OPTIMIZER)
    wrapper = build(ours)
    assert OPTIMIZER == before
    assert type(wrapper.optimizer) is Preconditioned is OPTIMIZERS.get('Preconditioned')
    assert wrapper.optimizer.defaults == dict(
        lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1
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
    assert next(iter(wrapper.optimizer.curvature.layers)).damping == 0.5
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
            theirs['lr'] = mine['lr']
        ours.train_step(batch(seed=step), wrapper)
        other.train_step(batch(seed=step), by_hand)
        scheduler.step()
    assert differences(ours.state_dict(), other.state_dict()) == []


# ------------------------------------------------------------------- configs


def config() -> Config:
    return Config(
        dict(
            optim_wrapper=dict(
                type='OptimWrapper',
                constructor='PrecondOptimWrapperConstructor',
                paramwise_cfg=dict(norm_decay_mult=0.0),
                optimizer=copy.deepcopy(OPTIMIZER),
            )
        )
    )


def test_options_of_the_command_line_reach_into_rule_and_layers() -> None:
    cfg = config()
    cfg.merge_from_dict(
        {
            'optim_wrapper.optimizer.rule.lr': 0.5,
            'optim_wrapper.optimizer.layers.1.preconditioner.damping': 0.25,
        }
    )
    wrapper = build_optim_wrapper(ours := model(), cfg.optim_wrapper)
    assert set(rates(wrapper, ours).values()) == {0.5} == {wrapper.optimizer.defaults['lr']}
    assert set(rates(wrapper, ours, 'weight_decay').values()) == {0.0, 0.1}
    found = {
        stack.method.damping
        for layer, stack in wrapper.optimizer.curvature.layers.items()
        if layer.name == 'conv.weight'
    }
    assert found == {0.25}


def test_a_config_goes_to_a_file_and_back(tmp_path: Path) -> None:
    cfg = config()
    cfg.dump(str(tmp_path / 'config.py'))
    again = Config.fromfile(str(tmp_path / 'config.py'))
    parsed = Config.fromstring(cfg.pretty_text, '.py')
    assert again.optim_wrapper == parsed.optim_wrapper == cfg.optim_wrapper
    built = [build_optim_wrapper(model(), c.optim_wrapper).optimizer for c in (cfg, again, parsed)]
    plain = build(model(), paramwise_cfg=dict(norm_decay_mult=0.0)).optimizer
    for optimizer in built:
        assert optimizer.table() == plain.table()
        assert optimizer.defaults == plain.defaults
        assert differences(optimizer.state_dict(), plain.state_dict()) == []
        assert {s.method for s in optimizer.curvature.stacks} == {
            s.method for s in plain.curvature.stacks
        }
    assert cfg.optim_wrapper == config().optim_wrapper  # building changes no config


def test_a_config_may_inherit_and_replace(tmp_path: Path) -> None:
    (tmp_path / 'base.py').write_text(
        "optim_wrapper = dict(type='OptimWrapper', optimizer=dict("
        "type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4))"
    )
    text = (
        "_base_ = 'base.py'\noptim_wrapper = dict(constructor='PrecondOptimWrapperConstructor',"
        f' optimizer=dict(DELETE**{OPTIMIZER!r}))'
    )
    (tmp_path / 'good.py').write_text(text.replace('DELETE', '_delete_=True, '))
    (tmp_path / 'bad.py').write_text(text.replace('DELETE', ''))
    wrapper = build_optim_wrapper(model(), Config.fromfile(tmp_path / 'good.py').optim_wrapper)
    assert type(wrapper.optimizer) is Preconditioned
    with pytest.raises(TypeError, match='`_delete_=True`') as caught:
        build_optim_wrapper(model(), Config.fromfile(tmp_path / 'bad.py').optim_wrapper)
    for key in ('lr', 'momentum', 'weight_decay'):
        assert key in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('file', ['afopt.py', 'afopt_nkfac.py'])
def test_lists_to_start_from(file: str) -> None:
    """configs/_base_, which the advice of `use_optimizer` names."""
    path = ROOT / 'configs' / '_base_' / file
    (layers,) = Config.fromfile(path).values()
    if file == 'afopt_nkfac.py':  # no attention in this model, and a match must hit
        with pytest.raises(ValueError, match='WindowMSA.*hits nothing'):
            build(model(), optimizer=dict(OPTIMIZER, layers=layers))
        layers = layers[1:]
    wrapper = build(model(), optimizer=dict(OPTIMIZER, layers=layers))
    assert len(wrapper.optimizer.curvature.layers) == 2


PRESETS = Config.fromfile(ROOT / 'configs/_base_/thesis.py').to_dict()


@pytest.mark.parametrize('name', PRESETS)
def test_presets_of_the_thesis(name: str) -> None:
    """They build, with the rate, decay and intervals they name, and train."""
    preset = dict(PRESETS[name])
    assert preset.pop('_delete_')
    network = model()
    wrapper = build(network, optimizer=dict(preset))
    optimizer = wrapper.optimizer
    assert type(optimizer).__name__ == preset['type']
    for key in ('lr', 'weight_decay'):
        assert optimizer.param_groups[0][key] == preset[key]
    for key in ('stat_interval', 'refresh_interval', 'scaling'):
        if key in preset:
            assert getattr(optimizer.curvature.stacks[0].method, key) == preset[key]
    network.train_step(batch(), wrapper)
    assert all(p.isfinite().all() for p in network.parameters())


def test_a_preset_replaces_the_optimizer_of_a_toolbox(tmp_path: Path) -> None:
    """As its file says, where the toolbox's SGD has what AdamR does not take."""
    pytest.importorskip('mmdet')
    folder = ROOT / 'configs/_base_'
    file = tmp_path / 'mine.py'
    file.write_text(
        f"_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', '{folder}/thesis.py']\n"
        "optim_wrapper = dict(constructor='PrecondOptimWrapperConstructor',\n"
        '                     optimizer={{_base_.coco_adamr_resnet}})\n'
    )
    optimizer = Config.fromfile(file).optim_wrapper.optimizer
    assert dict(optimizer, betas=None) == dict(
        type='AdamR',
        settings='published',
        lr=1e-4,
        betas=None,
        weight_decay=0.2,
        stat_interval=100,
        refresh_interval=1000,
    )


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    'no lr': (dict(rule=dict(type='AdamW')), ['no lr', "write rule=dict(type='AdamW', lr=...)"]),
    'no rule': (dict(rule=None), ['rule=None', 'write rule=dict(type=...']),
    'rule is a name': (dict(rule='AdamW'), ["rule='AdamW'", 'write rule=dict(type=...']),
    'no layers': (dict(layers=None), ['layers=None', 'write layers=[']),
    'bad lr': (dict(rule=dict(RULE, lr=-1)), ['lr=-']),
    'no match': (
        dict(layers=[dict(match=dict(name='head'), preconditioner=None), *LAYERS]),
        ["name='head'", 'hits nothing in Classifier'],
    ),
}


@pytest.mark.parametrize(
    'paramwise', [None, dict(norm_decay_mult=0.0, bias_lr_mult=2.0)], ids=['plain', 'paramwise']
)
@pytest.mark.parametrize('name', WRONG)
def test_errors_are_one_line(name: str, paramwise: Any) -> None:
    change, fragments = WRONG[name]
    with pytest.raises(ValueError) as caught:
        build(model(), optimizer=dict(OPTIMIZER, **change), paramwise_cfg=paramwise)
    assert '\n' not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_without_our_constructor_it_says_what_to_write() -> None:
    with pytest.raises(ValueError, match="constructor='PrecondOptimWrapperConstructor'") as caught:
        build_optim_wrapper(model(), dict(optimizer=OPTIMIZER))
    assert '\n' not in str(caught.value)


# ------------------------------------------------------------------- constructors and presets


def test_base_constructor_makes_the_groups() -> None:
    """It finds lr and decay where constructors look for them."""
    ours = model()
    wrapper = build(ours, base_constructor='HalfRateConstructor', paramwise_cfg=dict(a=1))
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
    (text,) = lines
    assert text.startswith('Preconditioned on Classifier')
    for part in ('conv', 'InputFeature', 'fc', 'NewtonKronecker', 'plain rule: BatchNorm2d'):
        assert part in text


def test_a_preset_needs_a_list() -> None:
    cfg = Config(dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.02))))
    before = cfg.to_dict()
    with pytest.raises(ValueError, match='list of layers.*write it in the config') as caught:
        use_optimizer(cfg, 'Preconditioned')
    assert '\n' not in str(caught.value) and 'configs/_base_' in str(caught.value)
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
