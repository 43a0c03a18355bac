"""Rows of the thesis's tables.

The `paper` entry of a config names its row. Scores and settings are those of
configs/paper_results.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mmprecond import optimizers

ROWS = Path(__file__).resolve().parents[2] / 'configs/paper_results.json'
#: Number of epochs, and the epochs at which the learning rate drops by a factor of 10.
SCHEDULES = {'1x': (12, [8, 11]), '2x': (24, [16, 22]), '3x': (36, [27, 33])}
#: Schedules for which MMDetection has a config of every baseline in the tables.
SHIPPED = ('1x', '3x')
COSINE = {'type': 'CosineAnnealingLR', 'T_max': 200, 'eta_min_ratio': 1e-3}
INTERVALS = ('stat_interval', 'refresh_interval')
#: Names for `--optimizer`, by the thesis's names.
OPTIMIZER_NAMES = {
    'SGDM': 'SGD',
    'SGDM_WN': 'SGD',
    'Adam': 'Adam',
    'AdamW': 'AdamW',
    'AdaGrad': 'Adagrad',
    'RAdam': 'RAdam',
    'AdaBelief': 'pytorch_optimizer.AdaBelief',
    'AdaHessian': 'pytorch_optimizer.AdaHessian',
    'Apollo': 'pytorch_optimizer.ApolloDQN',
    'Ranger': 'pytorch_optimizer.Ranger',
}
#: Tables without configs: their places in the thesis, and reasons.
WITHOUT_CONFIG = {
    '2.4.1': (
        'Section 2.4.1 (times)',
        'measure them with `tools/analysis_tools/figures.py partial`',
    ),
    '2.5': ('Table 2.5', 'MMEngine has no toolbox for person re-identification'),
    '2.6': ('Table 2.6', 'MMEngine has no toolbox for person re-identification'),
    '3.3': ('Table 3.3 (times)', 'measure them with `tools/analysis_tools/figures.py inversion`'),
}
#: Type of the data set, and number of classes.
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
    'VGG19-noBN': {'type': 'VGG', 'depth': 19, 'norm_cfg': None},
    'DenseNet121': {'type': 'DenseNet', 'arch': '121'},
    'GoogLeNet': {'type': 'torchvision.models.GoogLeNet', 'aux_logits': False},
    'Swin-T': {'type': 'SwinTransformer', 'arch': 'tiny'},
    'Swin-B': {'type': 'SwinTransformer', 'arch': 'base'},
}
#: Networks that take CIFAR's images enlarged, because their first layers shrink them.
ENLARGED = {'DenseNet121': 128, 'GoogLeNet': 256}
#: Settings in which a config of CIFAR-10 may differ from that of CIFAR-100 that it inherits.
_OTHER_CLASSES = (
    'model.head.num_classes',
    'model.backbone.num_classes',
    'data_preprocessor.',
    'train_dataloader.dataset.',
    'val_dataloader.dataset.',
    'test_dataloader.dataset.',
)


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: Entries of a config's `paper` that name the row.
        section: Section of the thesis that has the settings.
        result: Published scores.
        optimizer: Type and settings that the thesis states; empty if it cites the row.
        batch: Batch size of all GPUs together.
        epochs: Number of epochs; None for that of the toolbox.
        decay: Scheduler after the warm-up; None for that of the toolbox.
        image_size: Side of the images that the network sees; None for that of the toolbox.
        toolbox: Whether the optimizer is the one that MMDetection's config has.
        free: Settings, other than the optimizer's, that may differ from the inherited config.
        std: Standard deviation of the score over the thesis's runs, if it states one.
    """

    name: dict[str, Any]
    section: str
    result: dict[str, float]
    optimizer: dict[str, Any]
    batch: int
    epochs: int | None = None
    decay: dict[str, Any] | None = None
    image_size: int | None = None
    toolbox: bool = False
    free: tuple[str, ...] = ()
    std: float | None = None

    @property
    def is_ours(self) -> bool:
        """True if the optimizer is one of this package."""
        return plain_name(self.name['optimizer']) in optimizers.__all__

    @property
    def is_shipped(self) -> bool:
        """True for a row of COCO for which MMDetection has a config."""
        return self.toolbox and self.name['schedule'] in SHIPPED


@cache
def tables() -> list[dict[str, Any]]:
    """The tables of the file, in the order of their numbers."""
    content: list[dict[str, Any]] = json.loads(ROWS.read_text())['tables']
    return content


def table(number: str) -> dict[str, Any]:
    """A table of the file by its number."""
    return next(entry for entry in tables() if entry['table'] == number)


@cache
def all_rows() -> list[Row]:
    """All rows of classifiers and detectors, without ablations."""
    readers = {'classification': _classifiers, 'detection': _detectors}
    return [
        row
        for entry in tables()
        if entry['task'] in readers
        for row in readers[entry['task']](entry)
    ]


def rows() -> list[Row]:
    """All rows that need a config: our methods, and COCO baselines that MMDetection lacks."""
    return [
        row for row in all_rows() if row.is_ours or ('detector' in row.name and not row.is_shipped)
    ]


def baselines() -> list[Row]:
    """Rows of classifiers with optimizers of others."""
    return [row for row in all_rows() if 'model' in row.name and not row.is_ours]


def row_of(cfg: dict[str, Any]) -> Row:
    """Row of a config with a `paper` entry.

    Raises:
        ValueError: If the entry does not name exactly one row.
    """
    name = {key: value for key, value in cfg['paper'].items() if key != 'result'}
    matches = [row for row in rows() if row.name == name]
    if len(matches) != 1:
        raise ValueError(
            f'{len(matches)} rows of the thesis match the entry paper={name!r}; one must'
        )
    return matches[0]


def published_settings(optimizer: str) -> dict[str, Any]:
    """Settings of ``settings='published'`` for an optimizer of this package."""
    return dict(optimizers.get_optimizer_info(optimizer).published)


def plain_name(optimizer: str) -> str:
    """Name of an optimizer without the mark of weight normalisation."""
    return optimizer.removesuffix('_WN')


def _classifiers(content: dict[str, Any]) -> Iterator[Row]:
    epochs, decay = content.get('epochs'), _decay(content)
    for data, model, scores in content['rows']:
        free: tuple[str, ...] = ()
        if data.startswith('CIFAR'):
            free = ('param_scheduler', 'train_dataloader.batch_size')
        if data == 'CIFAR-10':
            free += _OTHER_CLASSES
        stated = content['settings'] | content.get('settings_by_model', {}).get(model, {})
        for optimizer, (top1, *std) in scores.items():
            yield Row(
                dict(table=content['table'], data=data, model=model, optimizer=optimizer),
                content['section'],
                {'top1': top1},
                _optimizer_settings(optimizer, stated.get(optimizer, {})),
                content['batch_size'],
                epochs,
                decay,
                content['image_size'],
                free=free,
                std=std[0] if std else None,
            )


def _detectors(content: dict[str, Any]) -> Iterator[Row]:
    for row in content['rows']:
        epochs, drops = SCHEDULES[row['schedule']]
        name = {key: row[key] for key in ('backbone', 'schedule', 'optimizer')}
        other_schedule = ('train_cfg.max_epochs', 'max_epochs', 'param_scheduler')
        yield Row(
            dict(table=content['table'], detector=content['detector'], **name),
            content['section'],
            row['result'],
            _optimizer_settings(
                row['optimizer'],
                {key: row[key] for key in ('lr', 'weight_decay', *INTERVALS) if key in row},
            ),
            content['batch_size'],
            epochs,
            _multistep_decay(drops),
            toolbox=row.get('toolbox', False),
            free=other_schedule if row['schedule'] == '2x' else (),
        )


def _optimizer_settings(optimizer: str, stated: dict[str, Any]) -> dict[str, Any]:
    """Settings of an optimizer's config; intervals that the thesis lacks are the method's own."""
    name = plain_name(optimizer)
    if name not in optimizers.__all__:
        return {'type': name, **stated} if stated else {}
    own = published_settings(name)
    return {'type': name, **{key: own[key] for key in INTERVALS if key in own}, **stated}


def _multistep_decay(epochs: list[int]) -> dict[str, Any]:
    return {'type': 'MultiStepLR', 'milestones': epochs, 'gamma': 0.1}


def _decay(content: dict[str, Any]) -> dict[str, Any] | None:
    """Scheduler of a schedule such as 'cosine' or 'x0.1 every 60 epochs'."""
    words = content.get('schedule')
    if words is None or words == 'cosine':
        return words and COSINE
    match = re.fullmatch(r'x0\.1 every (\d+) epochs', words)
    if match is None:
        raise ValueError(f'the schedule {words!r} is not like "x0.1 every 60 epochs"')
    step = int(match[1])
    return _multistep_decay(list(range(step, content['epochs'], step)))
