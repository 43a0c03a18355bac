"""Trains a config of MMDetection, MMPretrain or this project."""

from __future__ import annotations

import argparse

import torch
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmprecond.engine import launch
from mmprecond.engine.preflight import check_config
from mmprecond.engine.presets import choose_optimizer
from mmprecond.engine.rates import scale_rates


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='a config file, or mmdet::FOLDER/NAME.py')
    parser.add_argument(
        '--optimizer',
        metavar='NAME',
        help="train with this optimizer of mmprecond (or torch's SGD or AdamW) "
        'instead, or pytorch_optimizer.NAME of that package, keeping the '
        "config's lr, momentum, weight decay and paramwise_cfg",
    )
    launch.add_precondition(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from this checkpoint, or from the newest in the work dir',
    )
    parser.add_argument('--amp', action='store_true', help='train in mixed precision (GPU)')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale lr to the batch size by the config's auto_scale_lr: in proportion for rules "
        'like SGD, by the square root for rules like Adam',
    )
    launch.add_common_arguments(parser)
    return parser.parse_args()


def build(args: argparse.Namespace) -> Runner:
    """Builds the runner from the arguments."""
    cfg = launch.load_config(args.config)
    launch.check_mmcv(cfg.get('default_scope'))
    choose_optimizer(cfg, args.optimizer, args.precondition)
    launch.finish_config(cfg, args)
    if args.amp:
        if not torch.cuda.is_available():
            raise ValueError('--amp needs a GPU; leave it out to train in float32 here')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise ValueError(
                '--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the config'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    check_config(cfg)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


def main() -> None:
    args = parse_args()
    with launch.one_line_errors():
        runner = build(args)
        if isinstance(runner, Runner):  # early, so that errors of settings also take one line
            runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
            scale_rates(runner)
    # Of a checkpoint to resume, and of a LandscapeHook.
    with launch.one_line_errors('check_state_dict', 'check_length'):
        runner.train()


if __name__ == '__main__':
    launch.run(main)
