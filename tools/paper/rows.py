"""Rows of the thesis's tables, and differences between configs and their rows.

The `paper` entry of a config names its row. The figures come from configs/paper_results.json.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from mmprecond import optimizers

ROWS = Path(__file__).resolve().parents[2] / 'configs/paper_results.json'
#: Number of epochs, and the epochs at which the learning rate drops by a factor of 10.
SCHEDULES = {'1x': (12, [8, 11]), '2x': (24, [16, 22]), '3x': (36, [27, 33])}
#: Detectors with MMDetection configs for all default optimizers in the tables.
SHIPPED = ('1x', '3x')
COSINE = {'type': 'CosineAnnealingLR', 'T_max': 200, 'eta_min_ratio': 1e-3}
INTERVALS = ('stat_interval', 'refresh_interval')
CHAPTERS = {'SGDPH': 2, 'KFAC': 3, 'SKFAC': 3, 'NKFAC': 3, 'AdaNKFAC': 3, 'AdamWBK': 4, 'AdamR': 4}
#: Learning rate and decay on ImageNet where the file has none; AdamR's and AdamWBK's are uncertain.
OTHER_RATES = {
    'SKFAC': {'ResNet18': (5e-4, 0.02), 'ResNet50': (5e-4, 0.02)},
    'AdamR': {'ResNet18': (1e-3, 0.1), 'ResNet50': (5e-4, 0.3)},
    'AdamWBK': {'ResNet18': (1e-3, 0.1), 'ResNet50': (5e-4, 0.3)},
}
UNKNOWN = (math.nan, math.nan)
#: Torch's optimizers that the thesis compares with.
FIRST_ORDER = ('SGDM', 'AdamW')
#: Type and number of classes.
DATA = {
    'CIFAR-10': ('CIFAR10', 10),
    'CIFAR-100': ('CIFAR100', 100),
    'ImageNet': ('ImageNet', 1000),
    'Mini-ImageNet': ('CustomDataset', 100),
}
_BN = {'type': 'BN'}
#: Settings of a backbone that identify the network of a row. CIFAR has its own ResNets.
NETWORKS: dict[str, dict[str, Any]] = {
    'ResNet18': {'type': 'ResNet', 'depth': 18},
    'ResNet50': {'type': 'ResNet', 'depth': 50},
    'VGG11': {'type': 'VGG', 'depth': 11, 'norm_cfg': _BN},
    'VGG19': {'type': 'VGG', 'depth': 19, 'norm_cfg': _BN},
    'VGG19-noBN': {
        'type': 'VGG',
        'depth': 19,
        'norm_cfg': None,
        'conv_cfg': {'type': 'WeightNormConv2d'},
    },
    'DenseNet121': {'type': 'DenseNet', 'arch': '121'},
    'GoogLeNet': {'type': 'torchvision.models.GoogLeNet', 'aux_logits': False},
    'Swin-T': {'type': 'SwinTransformer', 'arch': 'tiny'},
    'Swin-B': {'type': 'SwinTransformer', 'arch': 'base'},
}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: Entries of a config's `paper` that name the row.
        result: Published scores; empty for settings without a row.
        optimizer: Type, learning rate, decay and intervals. Intervals that the thesis does not name
            are the method's own.
        batch: Batch size of all GPUs together.
        epochs: Number of epochs; None for that of the toolbox.
        decay: Scheduler after the warm-up; None for that of the toolbox.
        free: Settings, other than the optimizer's, that may differ from the inherited config.
    """

    name: dict[str, Any]
    result: dict[str, float] | None
    optimizer: dict[str, Any]
    batch: int
    epochs: int | None
    decay: dict[str, Any] | None
    free: tuple[str, ...] = ()


@cache
def rows() -> list[Row]:
    """All rows that need a config: our methods, and COCO baselines that MMDetection lacks."""
    content = json.loads(ROWS.read_text())
    return [
        *_coco(content['coco']),
        *_cifar(content['classification']['cifar'], _is_ours),
        *_imagenet(content['classification'], _is_ours),
    ]


def toolbox_rows() -> list[dict[str, Any]]:
    """Rows of COCO for which MMDetection has configs: table, detector, ..., result."""
    return [row for row in json.loads(ROWS.read_text())['coco'] if _is_shipped(row)]


def baselines() -> list[Row]:
    """Rows of classifiers with `FIRST_ORDER` optimizers; unknown learning rates are NaN."""
    content = json.loads(ROWS.read_text())['classification']
    return [*_cifar(content['cifar'], _is_baseline), *_imagenet(content, _is_baseline)]


def row_of(cfg: dict[str, Any]) -> Row:
    """Row of a config with a `paper` entry.

    Raises:
        ValueError: If the entry does not name exactly one row.
    """
    name = {key: value for key, value in cfg['paper'].items() if key != 'result'}
    matches = [row for row in rows() if row.name == name]
    if len(matches) != 1:
        raise ValueError(f'{len(matches)} rows of the paper are {list(name.values())}')
    return matches[0]


def departures(cfg: dict[str, Any], row: Row, name: str | None) -> list[str]:
    """Differences between a config and its row.

    Args:
        cfg: The config in plain dictionaries and lists.
        row: Row of the config.
        name: Name of the config, which gives a classifier's number of GPUs; None if unknown, to
            skip that check.
    """
    optimizer = cfg['optim_wrapper']['optimizer']
    usual = {'betas': [0.9, 0.999], 'momentum': 0.9}
    literal = {} if _is_baseline(row.name['optimizer']) else {'settings': 'published'}
    known = literal | row.optimizer
    expected = known | {key: usual.get(key, 'nothing') for key in optimizer if key not in known}
    pairs = {key: (optimizer.get(key), value) for key, value in expected.items()}
    pairs |= {
        'result': (cfg['paper'].get('result'), row.result),
        'batch': (cfg['auto_scale_lr']['base_batch_size'], row.batch),
    }
    if row.epochs is not None:
        pairs['max_epochs'] = (cfg['train_cfg']['max_epochs'], row.epochs)
    if row.decay is not None:
        pairs['schedule'] = (_decay_schedulers(cfg), [row.decay])
    if 'data' in row.name:
        pairs |= _classifier_pairs(cfg, row, name)
    return [
        f'{key} is {actual}, the paper has {value}'
        for key, (actual, value) in pairs.items()
        if actual != value
    ]


def plain(value: Any) -> Any:
    """Removes the scopes that inheritance from a toolbox leaves in a config."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key != '_scope_'}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def schedulers(cfg: Any) -> list[Any]:
    """List of a config's schedulers; MMEngine also takes a single scheduler."""
    configured = cfg['param_scheduler']
    return configured if isinstance(configured, list) else [configured]


def _decay_schedulers(cfg: dict[str, Any]) -> list[dict[str, Any]]:
    """Schedulers without warm-ups and without default settings."""
    usual = {'by_epoch': True, 'begin': 0, 'end': cfg['train_cfg']['max_epochs']}
    return [
        {key: value for key, value in scheduler.items() if key not in usual or usual[key] != value}
        for scheduler in schedulers(cfg)
        if scheduler['type'] != 'LinearLR'
    ]


def _classifier_pairs(
    cfg: dict[str, Any], row: Row, name: str | None
) -> dict[str, tuple[Any, Any]]:
    """Pairs of network, data and batch to compare: actual and expected."""
    model, (kind, classes) = cfg['model'], DATA[row.name['data']]
    backbone, network = model['backbone'], NETWORKS[row.name['model']]
    if network['type'] == 'ResNet' and kind.startswith('CIFAR'):
        network = network | {'type': 'ResNet_CIFAR'}
    loader = cfg['train_dataloader']
    pairs: dict[str, tuple[Any, Any]] = {
        'backbone': ({key: backbone.get(key) for key in network}, network),
        'classes': (
            [
                model['head'].get('num_classes') or backbone.get('num_classes'),
                cfg['data_preprocessor']['num_classes'],
            ],
            [classes, classes],
        ),
        'data': (loader['dataset']['type'], kind),
        'pretrained weights': ([cfg.get('load_from'), 'Pretrained' in str(model)], [None, False]),
    }
    if name is not None:
        batch = re.search(r'_(?:(\d+)x)?b(\d+)_', name)
        pairs['batch of a GPU, and of all'] = (
            [loader['batch_size'], loader['batch_size'] * int(batch[1] or 1)] if batch else None,
            [int(batch[2]), row.batch] if batch else 'in its name',
        )
    return pairs


def _coco(content: list[dict[str, Any]]) -> Iterator[Row]:
    keys = ('table', 'detector', 'backbone', 'schedule', 'optimizer')
    for row in content:
        if _is_shipped(row):
            continue
        epochs, drops = SCHEDULES[row['schedule']]
        yield Row(
            {key: row[key] for key in keys},
            row['result'],
            _optimizer_settings(row['optimizer'], row['lr'], row['weight_decay'], row),
            16,
            epochs,
            _multistep_decay(drops),
            ('train_cfg.max_epochs', 'max_epochs', 'param_scheduler')
            if row['schedule'] == '2x'
            else (),
        )


def _cifar(content: dict[str, Any], includes: Callable[[str], bool]) -> Iterator[Row]:
    for chapter in (2, 3, 4):
        part = content[f'chapter{chapter}']
        decay = (
            COSINE
            if part['schedule'] == 'cosine'
            else _periodic_decay(part['schedule'], content['epochs'])
        )
        for model, scores in part['cifar100'].items():
            for optimizer, top1 in scores.items():
                if not includes(optimizer):
                    continue
                rates = part['settings'][_plain_name(optimizer)]
                row = Row(
                    _row_name('CIFAR-100', chapter, model, optimizer),
                    {'top1': top1},
                    _optimizer_settings(optimizer, rates['lr'], rates['wd'], rates),
                    content['batch_size'],
                    content['epochs'],
                    decay,
                    ('param_scheduler', 'train_dataloader.batch_size'),
                )
                yield row
                if optimizer == 'NKFAC' and model.startswith('ResNet'):  # same settings, no row
                    yield replace(
                        row, name=_row_name('CIFAR-10', chapter, model, optimizer), result=None
                    )


def _imagenet(content: dict[str, Any], includes: Callable[[str], bool]) -> Iterator[Row]:
    swin = content['imagenet']['swin'] | {'batch_size': 1024, 'epochs': None}
    for data, part in (
        ('ImageNet', content['imagenet']),
        ('ImageNet', swin),
        ('Mini-ImageNet', content['mini_imagenet']),
    ):
        decay = _periodic_decay(part['schedule'], part['epochs']) if part['epochs'] else None
        for model, scores in part['top1'].items():
            for optimizer, top1 in scores.items():
                if not includes(optimizer):
                    continue
                rates = part['settings'].get(optimizer)
                lr, wd = (
                    (rates['lr'], rates['wd'])
                    if rates
                    else OTHER_RATES.get(optimizer, {}).get(model, UNKNOWN)
                )
                yield Row(
                    _row_name(data, CHAPTERS.get(optimizer), model, optimizer),
                    {'top1': top1},
                    _optimizer_settings(optimizer, lr, wd, rates or {}),
                    part['batch_size'],
                    part['epochs'],
                    decay,
                )


def _row_name(data: str, chapter: int | None, model: str, optimizer: str) -> dict[str, Any]:
    return {'data': data, 'chapter': chapter, 'model': model, 'optimizer': optimizer}


def _plain_name(optimizer: str) -> str:
    """Name of a network without the mark of weight normalisation."""
    return optimizer.removesuffix('_WN')


def _is_shipped(row: dict[str, Any]) -> bool:
    return row['is_toolbox_default'] and row['schedule'] in SHIPPED


def _is_ours(optimizer: str) -> bool:
    return _plain_name(optimizer) in optimizers.__all__


def _is_baseline(optimizer: str) -> bool:
    return _plain_name(optimizer) in FIRST_ORDER


def _optimizer_settings(
    optimizer: str, lr: float, decay: float, row: dict[str, Any]
) -> dict[str, Any]:
    """Settings of an optimizer's config; intervals missing in the row are the method's own."""
    kind = getattr(optimizers, _plain_name(optimizer), None)
    method = getattr(kind, 'preconditioner', None)
    own = (
        {key: kind.preset.get(key, getattr(method, key)) for key in INTERVALS}
        if kind and method
        else {}
    )
    return {
        'type': _plain_name(optimizer),
        'lr': lr,
        'weight_decay': decay,
        **{key: row.get(key, value) for key, value in own.items()},
    }


def _multistep_decay(epochs: list[int]) -> dict[str, Any]:
    return {'type': 'MultiStepLR', 'milestones': epochs, 'gamma': 0.1}


def _periodic_decay(words: str, epochs: int) -> dict[str, Any]:
    """Epochs of the drops in a schedule such as 'x0.1 every 60 epochs'."""
    match = re.fullmatch(r'x0\.1 every (\d+) epochs', words)
    if match is None:
        raise ValueError(f'the schedule {words!r} is not like "x0.1 every 60 epochs"')
    step = int(match[1])
    return _multistep_decay(list(range(step, epochs, step)))
