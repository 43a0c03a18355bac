"""Shows the loss around a checkpoint: spectrum of the Hessian, and the loss along two directions.

    python -m mmprecond.landscape CONFIG CHECKPOINT --out work_dirs/landscape

Writes pictures, tables and a page to turn and zoom. A checkpoint of NKFAC or another optimizer on
SGD also has the spectrum under its preconditioner. The command needs MMEngine; the functions that
this module hands on need only torch.
"""

from __future__ import annotations

import argparse
import logging
import sys
from importlib.util import find_spec as find_module
from pathlib import Path

from .loss_surface import (
    Loss,
    OutputLoss,
    Spectrum,
    StableRate,
    Surface,
    choose_product,
    explore,
    find_spectrum,
    find_surface,
    largest_rate,
    preconditioner_of,
    random_directions,
)

__all__ = [
    'Loss',
    'Spectrum',
    'StableRate',
    'OutputLoss',
    'Surface',
    'choose_product',
    'explore',
    'find_spectrum',
    'find_surface',
    'largest_rate',
    'preconditioner_of',
    'random_directions',
]

logger = logging.getLogger('mmprecond')


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    from .engine import launch
    from .loss_surface.explore import PLANES
    from .loss_surface.loss import MODES
    from .loss_surface.products import MATRICES, PRODUCTS

    parser = argparse.ArgumentParser(
        prog='python -m mmprecond.landscape', description=__doc__.splitlines()[0]
    )
    parser.add_argument('config', help='a config file, or mmdet::FOLDER/NAME.py')
    parser.add_argument('checkpoint', help='a checkpoint file of its training')
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/landscape'),
        help='folder of the files; default: work_dirs/landscape',
    )
    parser.add_argument(
        '--batches', type=launch.count, default=1, help='training batches; default: 1'
    )
    parser.add_argument(
        '--mode',
        choices=MODES,
        default='eval',
        help='batch normalisation by running statistics (eval, default) or by those of each batch',
    )
    parser.add_argument(
        '--matrix',
        choices=MATRICES,
        default='hessian',
        help='default: hessian; gauss-newton needs curvlinops and a classifier',
    )
    parser.add_argument(
        '--product',
        choices=PRODUCTS,
        default='auto',
        help='product with the Hessian: by second derivatives, by differences of gradients, or '
        '(default) by the former where the model has them',
    )
    parser.add_argument(
        '--steps', type=launch.count, default=30, help='Lanczos steps of a run; default: 30'
    )
    parser.add_argument('--runs', type=launch.count, default=2, help='random runs; default: 2')
    parser.add_argument(
        '--plane',
        choices=PLANES,
        default='eigen',
        help='directions of the surface: the two leading eigenvectors (default), two random ones '
        'normalised by filter, or no surface',
    )
    parser.add_argument('--span', type=float, help='largest coordinate of the surface')
    parser.add_argument(
        '--points', type=launch.count, default=15, help='points on its side; default: 15'
    )
    parser.add_argument(
        '--seed',
        type=int,
        default=0,
        help='seed of the batches, the Lanczos start vectors and random directions; default: 0',
    )
    launch.add_cfg_options(parser)
    return parser.parse_args()


def main() -> None:
    """Writes the files."""
    if find_module('mmengine') is None:
        sys.exit(
            'the command takes an MMEngine config, and MMEngine is not installed; in plain PyTorch '
            'call mmprecond.landscape.explore'
        )
    from .engine import landscape_inputs, launch

    args = parse_args()
    with launch.one_line_errors():
        loss, optimizer = landscape_inputs.build(args)
        explore(
            loss,
            args.out,
            optimizer,
            matrix=args.matrix,
            product=args.product,
            steps=args.steps,
            runs=args.runs,
            plane=args.plane,
            span=args.span,
            points=args.points,
            seed=args.seed,
        )


if __name__ == '__main__':
    main()
