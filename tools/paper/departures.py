"""Differences between a config and its row in the thesis's tables."""

from __future__ import annotations

import re
from typing import Any

from .rows import DATA, ENLARGED, INTERVALS, NETWORKS, Row, published_settings


def departures(cfg: dict[str, Any], row: Row, name: str | None) -> list[str]:
    """Differences between a config and its row.

    Args:
        cfg: The config in plain dictionaries and lists.
        row: Row of the config.
        name: Name of the config, which gives a classifier's number of GPUs; None if unknown, to
            skip that check.
    """
    pairs = _optimizer_pairs(cfg['optim_wrapper']['optimizer'], row)
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


def _optimizer_pairs(optimizer: dict[str, Any], row: Row) -> dict[str, tuple[Any, Any]]:
    """Pairs of an optimizer's settings: actual and expected.

    Settings that the config leaves out come from ``settings='published'``, but type, rates and
    intervals must be written out.
    """
    usual = {'betas': [0.9, 0.999], 'momentum': 0.9}
    literal = {'settings': 'published'} if row.is_ours else {}
    known = literal | row.optimizer
    implied = {}
    if optimizer.get('settings') == 'published':
        implied = published_settings(optimizer['type'])
    explicit = ('type', 'lr', 'weight_decay', *INTERVALS)
    pairs = {
        key: (optimizer.get(key, None if key in explicit else implied.get(key)), value)
        for key, value in known.items()
    }
    others = {key: usual.get(key, 'nothing') for key in optimizer if key not in known}
    return pairs | {key: (optimizer[key], value) for key, value in others.items()}


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
    if 'noBN' in row.name['model']:
        weight_norm = {'type': 'WeightNormConv2d'}
        network = network | {
            'conv_cfg': weight_norm if row.name['optimizer'].endswith('_WN') else None
        }
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
    pairs['image size'] = (
        _image_size(loader['dataset']['pipeline']),
        ENLARGED.get(row.name['model'], row.image_size)
        if kind.startswith('CIFAR')
        else row.image_size,
    )
    if name is not None:
        batch = re.search(r'_(?:(\d+)x)?b(\d+)_', name)
        if batch is None:
            return pairs | {"batch in the config's name": ('missing', row.batch)}
        pairs['batch of a GPU, and of all'] = (
            [loader['batch_size'], loader['batch_size'] * int(batch[1] or 1)],
            [int(batch[2]), row.batch],
        )
    return pairs


def _image_size(pipeline: list[dict[str, Any]]) -> Any:
    """Side of the images after the last step of a pipeline that sets it."""
    keys = {'RandomCrop': 'crop_size', 'RandomResizedCrop': 'scale', 'Resize': 'scale'}
    sizes = [step[keys[step['type']]] for step in pipeline if step['type'] in keys]
    return sizes[-1] if sizes else None
