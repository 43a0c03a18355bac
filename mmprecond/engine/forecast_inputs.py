"""Command line, model and optimizer of a cost forecast."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from torch import nn

from ..optimizers import PreconditionedOptimizer
from ..optimizers.replacement import REPLACEMENTS
from . import launch
from .constructor import DEFAULT
from .presets import choose_optimizer
from .resolution import class_name
from .synthetic import random_model

#: Texts of MMEngine's warnings about frozen parameters and about its registries.
NOISE = ('is skipped since', 'Failed to search registry')

#: Settings with the size of images, by the name of a transform. 'scale' has the width first.
SIZES = {
    'Resize': ('scale',),
    'RandomResize': ('scale',),
    'RandomChoiceResize': ('scales',),
    'RandomResizedCrop': ('scale',),
    'RandomCrop': ('crop_size',),
    'CenterCrop': ('crop_size',),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that choose the model, the optimizer and the batch."""
    parser.add_argument('config', help='a config file, or mmdet::FOLDER/NAME.py')
    parser.add_argument(
        '--optimizer',
        metavar='NAME',
        help="forecast for this optimizer of mmprecond in place of the config's",
    )
    launch.add_precondition(parser)
    parser.add_argument(
        '--batch', type=launch.count, help="images; default: the config's batch of one GPU, or 2"
    )
    parser.add_argument(
        '--size',
        type=launch.count,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help="default: the size of the config's training images, else 224 224",
    )
    launch.add_cfg_options(parser)


class ForecastInputs(NamedTuple):
    """A model, its optimizer, the number of images, and their size (None: the model's own)."""

    model: nn.Module
    optimizer: PreconditionedOptimizer
    batch: int
    size: Sequence[int] | None


def load(args: argparse.Namespace, attach: bool = True) -> Any:
    """Loads the config with the optimizer and settings that the arguments name.

    Args:
        args: Arguments from `add_arguments`.
        attach: Whether a config's own SGD or AdamW gets the methods that are attached by default.

    Raises:
        ValueError: If the arguments exclude each other.
    """
    cfg = launch.load_config(args.config)
    launch.check_mmcv(cfg.get('default_scope'))
    usual = _usual(cfg, args.optimizer) if attach else None
    choose_optimizer(cfg, args.optimizer, args.precondition or usual)
    launch.merge_options(cfg, args.cfg_options)
    _quieten_log()
    return cfg


def build(args: argparse.Namespace) -> ForecastInputs:
    """Builds the model with random weights, and its optimizer.

    Args:
        args: Arguments from `add_arguments`.

    Raises:
        ValueError: If the arguments exclude each other, or the optimizer has no preconditioner.
    """
    cfg = load(args)
    loader = cfg.get('train_dataloader') or {}
    return ForecastInputs(
        *build_model(cfg),
        args.batch or loader.get('batch_size') or 2,
        args.size or image_size(loader.get('dataset')),
    )


def _usual(cfg: Any, optimizer: str | None) -> str | None:
    """Methods that are attached by default, for a config whose optimizer can be a rule."""
    wrapper = cfg.get('optim_wrapper') or {}
    kind = class_name((wrapper.get('optimizer') or {}).get('type'))
    usual = kind in REPLACEMENTS and not optimizer and 'precondition' not in wrapper
    return DEFAULT if usual else None


def image_size(dataset: Any) -> tuple[int, int] | None:
    """Height and width of a config's training images, by its last transform with a size, or None.

    Of several sizes the last counts, which is the largest by custom.
    """
    if not isinstance(dataset, dict):
        return None
    found = None
    for transform in dataset.get('pipeline') or ():
        kind = class_name(transform.get('type')) if isinstance(transform, dict) else ''
        for key in SIZES.get(kind, ()):
            given = transform.get(key)
            pair = (
                isinstance(given, (list, tuple)) and given and isinstance(given[-1], (list, tuple))
            )
            value = given[-1] if pair else given
            if isinstance(value, int):
                found = value, value
            elif isinstance(value, (list, tuple)) and len(value) == 2:
                width_first = key in ('scale', 'scales') and kind != 'RandomResizedCrop'
                first, second = (int(side) for side in value)
                found = (second, first) if width_first else (first, second)
    inner = dataset.get('datasets') or [dataset.get('dataset')]
    return found or next((size for part in inner if (size := image_size(part))), None)


def _quieten_log() -> None:
    """Hides the log's lines for each parameter and each registry; other warnings stay."""
    logger = MMLogger.get_current_instance()
    logger.setLevel('WARNING')
    logger.addFilter(lambda record: not any(text in record.getMessage() for text in NOISE))


def build_model(cfg: Any) -> tuple[nn.Module, PreconditionedOptimizer]:
    """Builds the model of a config, with random weights, and its optimizer.

    Raises:
        ValueError: If the model cannot be built here, or the config has no optimizer with a
            preconditioner.
    """
    if not cfg.get('model') or not cfg.get('optim_wrapper'):
        raise ValueError('the config has no model or no optim_wrapper to forecast the cost of')
    try:
        model = random_model(cfg)
    except (AssertionError, RuntimeError) as error:  # such as a package that is not installed
        raise ValueError(f'the model cannot be built: {" ".join(str(error).split())}') from error
    optimizer = build_optim_wrapper(model, launch.in_full_precision(cfg.optim_wrapper)).optimizer
    if not isinstance(optimizer, PreconditionedOptimizer):
        raise ValueError(
            f'the config trains with {type(optimizer).__name__}, which has no '
            'preconditioner; add one by --precondition AFOpt+NKFAC, or choose one of ours by '
            '--optimizer NAME'
        )
    return model, optimizer
