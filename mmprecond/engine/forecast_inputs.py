"""Command line, model and optimizer of a cost forecast."""

from __future__ import annotations

import argparse
from typing import Any

from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from torch import nn

from ..optimizers import PreconditionedOptimizer
from . import launch
from .presets import BASELINES, attach, use_optimizer
from .synthetic import random_model

#: Texts of MMEngine's warnings about frozen parameters and about its registries.
NOISE = ('is skipped since', 'Failed to search registry')

#: Settings of MMEngine's `AmpOptimWrapper` alone.
MIXED_PRECISION = ('loss_scale', 'dtype', 'use_fp16')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that choose the model, the optimizer and the batch."""
    parser.add_argument('config', help='a config file, or mmdet::FOLDER/NAME.py')
    parser.add_argument(
        '--optimizer',
        metavar='NAME',
        help="forecast for this optimizer of mmprecond in place of the config's",
    )
    launch.add_precondition(parser)
    parser.add_argument('--batch', type=launch.count, default=2, help='images; default: 2')
    parser.add_argument(
        '--size',
        type=launch.count,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help='default: the size that a pose estimator or a segmentor is made for, else 224 224',
    )
    launch.add_cfg_options(parser)


def build(args: argparse.Namespace) -> tuple[nn.Module, PreconditionedOptimizer]:
    """Builds the model with random weights, and its optimizer.

    Args:
        args: Arguments from `add_arguments`.

    Raises:
        ValueError: If the arguments exclude each other, or the optimizer has no preconditioner.
    """
    if args.optimizer and args.precondition and args.optimizer not in BASELINES:
        raise ValueError(f'--precondition adds curvature to SGD or AdamW, not to {args.optimizer}')
    launch.check_mmcv()
    cfg = launch.load_config(args.config)
    if args.optimizer:
        use_optimizer(cfg, args.optimizer)
    if args.precondition:
        attach(cfg, args.precondition)
    launch.merge_options(cfg, args.cfg_options)
    _quieten_log()
    return build_model(cfg)


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
    optimizer = build_optim_wrapper(model, _in_full_precision(cfg.optim_wrapper)).optimizer
    if not isinstance(optimizer, PreconditionedOptimizer):
        raise ValueError(
            f'the config trains with {type(optimizer).__name__}, which has no '
            'preconditioner; add one by --precondition AFOpt+NKFAC, or choose one of ours by '
            '--optimizer NAME'
        )
    return model, optimizer


def _in_full_precision(wrapper: dict[str, Any]) -> dict[str, Any]:
    """Settings of a wrapper without those of mixed precision, which needs a GPU."""
    kept = {key: value for key, value in wrapper.items() if key not in MIXED_PRECISION}
    if isinstance(wrapper.get('type'), str):
        kept['type'] = wrapper['type'].replace('AmpOptim', 'Optim')
    return kept
