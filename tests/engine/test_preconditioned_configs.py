"""`Preconditioned` in configs: options, files, inheritance, presets of the thesis, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

from mmprecond.optimizers import Preconditioned
from tests.support.classifier import batch
from tests.support.paths import ROOT
from tests.support.preconditioned_configs import (
    LAYERS,
    OPTIMIZER,
    RULE,
    build,
    config,
    model,
    rates,
)
from tests.support.states import differences


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


def test_a_list_to_start_from() -> None:
    """configs/_base_/afopt.py, which configs of the thesis inherit."""
    (layers,) = Config.fromfile(ROOT / 'configs/_base_/afopt.py').values()
    wrapper = build(model(), optimizer=dict(OPTIMIZER, layers=layers))
    assert len(wrapper.optimizer.curvature.layers) == 1  # convolutions take the plain rule


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
    'no layers': (dict(layers=None), ['layers=None', "write 'NKFAC' for all layers"]),
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
