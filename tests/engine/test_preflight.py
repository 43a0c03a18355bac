"""Mistakes in a config: one line each, before the model is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, OPTIMIZERS

import mmprecond
from mmprecond.engine import PrecondOptimWrapperConstructor, launch, preflight
from mmprecond.engine.preflight import check_config, check_data
from mmprecond.engine.resolution import resolve
from tests.support.classifier import Classifier
from tests.support.paths import ROOT


def config(**changes: Any) -> Config:
    """A small config of MMEngine, with a value by dotted key for each change."""
    cfg = Config(
        dict(
            model=dict(type='Unknown', head=dict(num_classes=3)),
            optim_wrapper=dict(
                constructor='PrecondOptimWrapperConstructor',
                optimizer=dict(type='NKFAC', lr=0.1),
            ),
            train_dataloader=dict(dataset=dict(type='mmengine.dataset.BaseDataset')),
        )
    )
    cfg.merge_from_dict({key.replace('__', '.'): value for key, value in changes.items()})
    return cfg


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(optim_wrapper__optimizer__dampnig=1.0), 'dampnig; did you mean damping'),
        (dict(optim_wrapper__optimizer__damping='a'), "damping='a' is out of range"),
        (dict(optim_wrapper__optimizer__type='NKFACC'), 'did you mean NKFAC'),
        (
            dict(
                optim_wrapper__optimizer=dict(
                    type='Preconditioned',
                    layers='NKFC',
                    rule=dict(type='SGDM', lr=0.1),
                    _delete_=True,
                )
            ),
            'did you mean NKFAC',
        ),
        (
            dict(
                optim_wrapper__optimizer=dict(
                    type='Preconditioned',
                    overhead=2.0,
                    layers='NKFAC',
                    rule=dict(type='SGDM', lr=0.1),
                    _delete_=True,
                )
            ),
            'overhead=2.0 is out of range',
        ),
        (dict(optim_wrapper__overhad=0.1), 'optim_wrapper has overhad; did you mean overhead[?]$'),
        (
            dict(optim_wrapper__constructor='DefaultOptimWrapperConstructor'),
            "NKFAC needs constructor='PrecondOptimWrapperConstructor'.*--optimizer NKFAC",
        ),
        (dict(load_from='/no/such.pth'), r'no checkpoint /no/such.pth \(load_from\)'),
        (
            dict(model__init_cfg=dict(type='Pretrained', checkpoint='/no/such.pth')),
            'no checkpoint /no/such.pth .*; init_cfg=None',
        ),
        (
            dict(train_dataloader__dataset__ann_file='/no/such.json'),
            'not there: /no/such.json .train_dataloader.; set',
        ),
        (dict(train_dataloader__dataset__data_prefix=dict(img='/no/images')), '/no/images'),
        (
            dict(
                val_dataloader=dict(dataset=dict(type='mmengine.dataset.BaseDataset')),
                val_evaluator=[dict(type='M', ann_file='/no/val.json')],
            ),
            '/no/val.json .val_evaluator.ann_file.; set',
        ),
        (
            dict(train_dataloader__dataset__metainfo=dict(classes=('a', 'b', 'c', 'd'))),
            r'model.head has num_classes=3, .* have 4 classes .*; write num_classes=4',
        ),
        (
            dict(train_dataloader__dataset__metainfo=dict(classes='cat')),
            r"write a tuple: \('cat',\)",
        ),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(changes: dict[str, Any], message: str) -> None:
    cfg = config(**changes)
    with pytest.raises(
        (ValueError, TypeError, KeyError, FileNotFoundError), match=message
    ) as found:
        check_config(cfg)
    assert '\n' not in str(found.value)


def test_a_good_config_passes(tmp_path: Path) -> None:
    (tmp_path / 'train.json').write_text(json.dumps({}))
    (tmp_path / 'images').mkdir()
    dataset = dict(
        type='mmengine.dataset.BaseDataset',
        data_root=str(tmp_path),
        ann_file='train.json',
        data_prefix=dict(img='images', seg='unused'),
        metainfo=dict(classes=('a', 'b', 'c')),
    )
    repeated = dict(type='RepeatDataset', times=2, dataset=dataset)
    cfg = config(train_dataloader=dict(dataset=repeated), val_dataloader=dict(dataset=dataset))
    check_config(cfg)
    for optimizer in (dict(type='AdamW', lr=0.1), dict(type='SGDPH', lr=0.1)):
        cfg.optim_wrapper.optimizer = optimizer
        check_config(cfg)
    dataset['ann_file'] = 'other.json'
    with pytest.raises(FileNotFoundError, match='not there: .*/other.json .train_dataloader.; set'):
        check_config(config(train_dataloader=dict(dataset=repeated)))


def test_an_evaluator_may_have_no_annotations() -> None:
    loader = dict(dataset=dict(type='mmengine.dataset.BaseDataset'))
    evaluator = dict(type='CocoMetric', ann_file=None)
    check_config(config(val_dataloader=loader, val_evaluator=evaluator))


def test_an_evaluation_needs_no_initial_weights() -> None:
    cfg = config(model__head__init_cfg=dict(type='Pretrained', checkpoint='none/here.pth'))
    check_config(cfg, ['test'])
    with pytest.raises(FileNotFoundError, match='init_cfg=None'):
        check_config(cfg)
    cfg.load_from = 'none/there.pth'
    with pytest.raises(FileNotFoundError, match='no checkpoint none/there.pth'):
        check_config(cfg, ['test'])


def test_the_classes_of_a_detector_are_those_of_the_data() -> None:
    cfg = Config.fromfile(ROOT / 'configs/quickstart/faster-rcnn_r18_fpn_shapes.py')
    cfg.model.roi_head.bbox_head.num_classes = 80
    with pytest.raises(
        ValueError, match='model.roi_head.bbox_head has num_classes=80, but .* have 4 classes'
    ):
        check_config(cfg, ['train'])


@pytest.mark.parametrize(
    ('key', 'known'),
    [
        ('optim_wrapper.optimzer.lr', False),
        ('optim_wrapper.optimizer.momentum', True),
        ('train_dataloadr.batch_size', False),
        ('val_dataloader.batch_size', True),
        ('model.stage2', True),
    ],
)
def test_misspelt_options_are_refused(key: str, known: bool) -> None:
    cfg = config(model__stage1=1)
    if known:
        launch.merge_options(cfg, {key: 3})
        return
    with pytest.raises(ValueError, match=f'--cfg-options {key}: the config has no .*did you mean'):
        launch.merge_options(cfg, {key: 3})


@pytest.mark.parametrize(('launcher', 'start'), [('pytorch', 'dist_train'), ('slurm', 'slurm_tr')])
def test_launchers_must_have_started_the_process(
    launcher: str, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv('RANK', raising=False)
    with pytest.raises(ValueError, match=f'--launcher {launcher} .* `.*{start}'):
        launch.check_launcher(launcher)
    launch.check_launcher('none')


def test_types_may_have_the_name_of_the_package() -> None:
    assert resolve(HOOKS, 'mmprecond.CurvatureHook') is mmprecond.CurvatureHook
    assert resolve(OPTIMIZERS, 'mmprecond.NKFAC') is mmprecond.NKFAC


def test_multipliers_do_not_need_a_decay() -> None:
    """MMEngine's constructor alone says `base_wd should not be None`."""
    cfg = dict(
        constructor=PrecondOptimWrapperConstructor.__name__,
        optimizer=dict(type='NKFAC', lr=0.1),
        paramwise_cfg=dict(norm_decay_mult=0.0),
    )
    built = build_optim_wrapper(Classifier(), cfg)
    assert {group['weight_decay'] for group in built.optimizer.param_groups} == {0.0}


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(custom_hooks=[dict(type='CurvatureHok')]), 'did you mean CurvatureHook'),
        (
            dict(custom_hooks=[dict(type='CurvatureHook', map_intervl=1)]),
            'CurvatureHook does not take map_intervl; did you mean map_interval',
        ),
        (dict(custom_hooks=["dict(type='CurvatureHook')"]), 'write the hook into a config file'),
        (dict(param_scheduler=[dict(type='LinearLRR')]), 'did you mean LinearLR'),
        (
            dict(param_scheduler=dict(type='LinearParamScheduler', param_name='dampng')),
            "param_name='dampng'; did you mean damping",
        ),
        (dict(optim_wrapper__type='AmpOptimWraper'), 'did you mean AmpOptimWrapper'),
        (dict(optim_wrapper__clip_grad=dict(max_nrom=35)), 'has max_nrom; did you mean max_norm'),
        (
            dict(optim_wrapper__paramwise_cfg=dict(custom_keys=dict(fc=dict(precondtion=False)))),
            "custom_keys\\['fc'\\] has precondtion; did you mean precondition",
        ),
    ],
    ids=str,
)
def test_misspelt_names_are_found(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, KeyError), match=message):
        check_config(config(**changes))


def test_keys_of_old_configs_are_named() -> None:
    with pytest.raises(ValueError, match='MMEngine reads optim_wrapper.optimizer'):
        launch.merge_options(config(), {'optimizer.lr': 0.1})


def test_an_optimizer_of_old_configs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(preflight, 'print_log', lambda text, **_: said.append(text))
    cfg = config()
    cfg.optimizer = cfg.optim_wrapper.optimizer  # a name for what the wrapper has
    check_config(cfg)
    assert said == []
    check_config(config(optimizer=dict(type='SGD', lr=0.1)))
    assert said == [
        'the config has optimizer, which MMEngine ignores; it reads optim_wrapper.optimizer'
    ]


def test_annotations_in_a_remote_storage_are_not_looked_up() -> None:
    remote = dict(backend='petrel', path_mapping={'./data/': 's3://bucket/data/'})
    evaluator = dict(type='CocoMetric', ann_file='/no/val.json', backend_args=remote)
    cfg = Config(dict(val_dataloader=dict(batch_size=1), val_evaluator=evaluator))
    check_data(cfg, ['val'])
    del cfg.val_evaluator['backend_args']
    with pytest.raises(FileNotFoundError, match='/no/val.json'):
        check_data(cfg, ['val'])
