"""Checks of a config before anything slow starts: data, classes, checkpoints, the optimizer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from mmengine.registry import (
    DATASETS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIMIZERS,
    init_default_scope,
)

from ..checks import did_you_mean
from ..optimizers import Preconditioned, PreconditionedOptimizer
from .constructor import PrecondOptimWrapperConstructor
from .preflight_types import check_types
from .resolution import resolve

#: Keys of configs before MMEngine, and those of today.
OLD_KEYS = {
    'optimizer': 'optim_wrapper.optimizer',
    'optimizer_config': 'optim_wrapper.clip_grad',
    'lr_config': 'param_scheduler',
    'runner': 'train_cfg',
    'total_epochs': 'train_cfg.max_epochs',
    'data': 'train_dataloader, val_dataloader and test_dataloader',
}
#: Entries of `optim_wrapper` that its constructor does not get.
NOT_OURS = ('constructor', 'paramwise_cfg')

#: Data prefixes that a dataset cannot do without; others depend on its pipeline.
IMAGES = ('img', 'img_path', 'img_prefix')
#: Heads whose number of classes is that of the data, with True if it must be equal.
HEADS = {
    'roi_head.bbox_head': True,
    'roi_head.mask_head': True,
    'bbox_head': False,  # those that read words have room for 256
    'head': False,
}
#: Toolboxes whose datasets know their classes before they read anything.
KNOW_CLASSES = ('mmengine', 'mmdet', 'mmpretrain')
#: Settings of a dataset that reads nothing.
LAZY: dict[str, Any] = dict(pipeline=[], lazy_init=True)
#: Settings that say where the data are.
PATHS = ('data_root', 'ann_file', 'data_prefix')


def check_config(cfg: Config, loaders: Sequence[str] = ('train', 'val')) -> None:
    """Raises the errors that the runner would raise after it has built the model.

    Args:
        cfg: The config.
        loaders: The data loaders that the run uses, without '_dataloader'.

    Raises:
        FileNotFoundError: If annotations, images or a checkpoint are missing.
        ValueError: If the heads and the data differ in their classes, or a setting is invalid.
        TypeError: If a setting is unknown.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    if 'train' in loaders:
        warn_of_old_keys(cfg)
        check_types(cfg)
        check_optimizer(cfg)
    check_checkpoints(cfg, 'train' in loaders)
    check_data(cfg, loaders)


def warn_of_old_keys(cfg: Config) -> None:
    """Warns of keys of old configs, which MMEngine ignores; some toolboxes' own have them."""
    used = (cfg.get('optim_wrapper') or {}).get('optimizer')
    for key in ('optimizer', 'optimizer_config', 'lr_config', 'runner'):
        value = cfg.get(key)
        if isinstance(value, dict) and not (key == 'optimizer' and value == used):
            print_log(
                f'the config has {key}, which MMEngine ignores; it reads {OLD_KEYS[key]}',
                logger='current',
                level=logging.WARNING,
            )


def check_optimizer(cfg: Config) -> None:
    """Checks the settings of an optimizer of this package, or of one that gets curvature."""
    wrapper = cfg.get('optim_wrapper')
    if not isinstance(wrapper, dict):
        return
    name = wrapper.get('constructor', 'DefaultOptimWrapperConstructor')
    if resolve(OPTIM_WRAPPER_CONSTRUCTORS, name) is PrecondOptimWrapperConstructor:
        given = {key: value for key, value in wrapper.items() if key not in NOT_OURS}
        PrecondOptimWrapperConstructor(given, wrapper.get('paramwise_cfg')).check_settings()
        return
    chosen = (wrapper.get('optimizer') or {}).get('type')
    kind = None if chosen is None else resolve(OPTIMIZERS, chosen)
    if isinstance(kind, type) and issubclass(kind, PreconditionedOptimizer):
        option = '--precondition METHOD' if kind is Preconditioned else f'--optimizer {chosen}'
        raise ValueError(
            f"{chosen} needs constructor='{PrecondOptimWrapperConstructor.__name__}' in "
            f'optim_wrapper; or leave the config as it is and start with {option}'
        )


def check_checkpoints(cfg: Config, initial: bool = True) -> None:
    """Raises FileNotFoundError if a checkpoint that the config names is not there.

    Args:
        cfg: The config.
        initial: Whether the weights that `init_cfg` names are read too, as in a training.
    """
    entries = _entries(cfg.get('model')) if initial else ()
    given = [(key, path) for key, path in entries if key == 'checkpoint']
    for key, path in [('load_from', cfg.get('load_from')), *given]:
        if isinstance(path, str) and _is_missing(path):
            advice = 'init_cfg=None trains from random weights' if key == 'checkpoint' else ''
            raise FileNotFoundError(
                f'there is no checkpoint {path} ({key}){"; " if advice else ""}{advice}'
            )


def check_data(cfg: Config, loaders: Sequence[str]) -> None:
    """Checks files and folders of the datasets and evaluators, and the number of classes."""
    missing = []
    for loader in loaders:
        key = f'{loader}_dataloader'
        for dataset in _datasets((cfg.get(key) or {}).get('dataset')):
            built = _build_lazily(dataset)
            if built is None:
                continue
            missing += [f'{path} ({key})' for path in _paths(built) if _is_missing(path)]
            if loader == 'train' and type(built).__module__.split('.')[0] in KNOW_CLASSES:
                check_classes(cfg, built.metainfo.get('classes'))
        if cfg.get(key):
            missing += [
                f'{path} ({loader}_evaluator.ann_file)'
                for path in _annotations(cfg.get(f'{loader}_evaluator'))
                if _is_missing(path)
            ]
    if missing:
        found = ', '.join(dict.fromkeys(missing))
        raise FileNotFoundError(
            f'the data are not there: {found}; set the named keys in the config, or by '
            f'--cfg-options {loaders[0]}_dataloader.dataset.data_root=FOLDER, '
            f'{loaders[-1]}_evaluator.ann_file=FILE and so on (a data_root at the top of a config '
            'reaches none of them)'
        )


def check_classes(cfg: Config, classes: Any) -> None:
    """Raises ValueError if the model's heads have another number of classes than the data."""
    if isinstance(classes, str):
        raise ValueError(f"metainfo has classes={classes!r}; write a tuple: ('{classes}',)")
    for part, equal in HEADS.items():
        head: Any = cfg.get('model')
        for name in part.split('.'):
            head = head.get(name) if isinstance(head, dict) else None
        for key, count in _entries(head):
            if key != 'num_classes' or not classes or not isinstance(count, int):
                continue
            if len(classes) > count or (equal and len(classes) != count):
                raise ValueError(
                    f'model.{part} has num_classes={count}, but the training data have '
                    f'{len(classes)} classes ({", ".join(map(str, classes[:3]))}, ...); write '
                    f'num_classes={len(classes)} there, or name the classes in metainfo'
                )


def check_options(cfg: Config, options: dict[str, Any]) -> None:
    """Raises ValueError for a key of `--cfg-options` that looks like a misspelt one.

    Args:
        cfg: The config before the options.
        options: Values by dotted key.
    """
    whole = cfg.to_dict()
    for dotted in options:
        part: Any = whole
        names = dotted.split('.')
        if names[0] in OLD_KEYS and names[0] not in whole:
            raise ValueError(f'--cfg-options {dotted}: MMEngine reads {OLD_KEYS[names[0]]}')
        for name in names:
            if isinstance(part, list | tuple) and name.isdecimal() and int(name) < len(part):
                part = part[int(name)]
                continue
            if not isinstance(part, dict):
                break
            if name not in part:
                _refuse_misspelt(dotted, name, list(part))
                break
            part = part[name]


def _refuse_misspelt(dotted: str, name: str, names: list[str]) -> None:
    letters = name.rstrip('0123456789')
    near = did_you_mean(name, [n for n in names if n.rstrip('0123456789') != letters], 0.85)
    if near:
        raise ValueError(
            f'--cfg-options {dotted}: the config has no {name} there; {near}(if it is meant, write '
            'it into a config file)'
        )


def _datasets(dataset: Any) -> Iterator[dict[str, Any]]:
    """The datasets in a config's dataset, of which some contain others."""
    if not isinstance(dataset, dict):
        return
    inner = dataset.get('datasets') or [dataset.get('dataset')]
    if any(isinstance(part, dict) for part in inner):
        for part in inner:
            yield from _datasets(part)
    else:
        yield dataset


def _build_lazily(dataset: dict[str, Any]) -> BaseDataset | None:
    """A dataset with its paths, which has read nothing; None where that is not possible."""
    kind = resolve(DATASETS, dataset['type'])
    if not isinstance(kind, type) or not issubclass(kind, BaseDataset) or not _is_local(dataset):
        return None
    left_out = ('type', '_scope_', *LAZY)
    settings = {key: value for key, value in dataset.items() if key not in left_out}
    try:
        return kind(**settings, **LAZY)
    except (TypeError, AssertionError):  # it does not know `lazy_init`, or looks for its files
        known = {key: settings[key] for key in PATHS if key in settings}
        return BaseDataset(**known, **LAZY)


def _is_local(part: dict[str, Any]) -> bool:
    """True unless a dataset or an evaluator reads from a remote storage."""
    return bool((part.get('backend_args') or {}).get('backend', 'local') == 'local')


def _annotations(evaluator: Any) -> Iterator[str]:
    """Local files of annotations that an evaluator, or each in a list, will read."""
    for part in evaluator if isinstance(evaluator, list | tuple) else [evaluator]:
        if isinstance(part, dict) and _is_local(part):
            files = (path for key, path in _entries(part) if key == 'ann_file')
            yield from (path for path in files if isinstance(path, str))


def _paths(dataset: BaseDataset) -> list[str]:
    """Annotations and folder of images that a dataset will read."""
    if getattr(dataset, 'download', False):
        return []  # it fetches what is missing
    images = [path for key, path in dataset.data_prefix.items() if key in IMAGES]
    files = dataset.ann_file if isinstance(dataset.ann_file, list) else [dataset.ann_file]
    return [path for path in (*files, *images) if path]


def _is_missing(path: Any) -> bool:
    """True for a path of this machine that does not exist."""
    text = str(path)
    return bool(text) and '://' not in text and not Path(text).exists()


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of a nested config."""
    if isinstance(config, dict):
        parts = list(config.items())
    else:
        parts = [('', part) for part in config] if isinstance(config, list | tuple) else []
    for key, value in parts:
        yield key, value
        yield from _entries(value)
