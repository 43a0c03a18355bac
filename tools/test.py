"""Evaluates a checkpoint with the test loop of its config."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmprecond.engine import launch
from mmprecond.engine.preflight import check_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='a config file, or mmdet::FOLDER/NAME.py')
    parser.add_argument('checkpoint', help='a checkpoint file')
    launch.add_common_arguments(parser)
    return parser.parse_args()


def build(args: argparse.Namespace) -> Runner:
    """Builds the runner from the arguments."""
    cfg = launch.load_config(args.config)
    launch.check_mmcv(cfg.get('default_scope'))
    if '://' not in args.checkpoint and not Path(args.checkpoint).is_file():
        raise FileNotFoundError(
            f'there is no checkpoint {args.checkpoint}; training writes '
            'epoch_N.pth or iter_N.pth into its work dir'
        )
    launch.finish_config(cfg, args)
    cfg.load_from = args.checkpoint
    check_config(cfg, ['test'])
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


def main() -> None:
    args = parse_args()
    with launch.one_line_errors():
        runner = build(args)
    runner.test()


if __name__ == '__main__':
    launch.run(main)
