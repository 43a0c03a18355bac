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
from collections.abc import Callable
from importlib.util import find_spec as find_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .loss_surface import (
    Loss,
    Spectrum,
    Surface,
    choose_product,
    draw_spectra,
    draw_surface,
    find_spectrum,
    find_surface,
    preconditioner_of,
    random_directions,
    write_page,
    write_spectra,
    write_surface,
)

__all__ = [
    'Loss',
    'Spectrum',
    'Surface',
    'choose_product',
    'find_spectrum',
    'find_surface',
    'preconditioner_of',
    'random_directions',
]

logger = logging.getLogger('mmprecond')

#: Directions of the surface.
PLANES = ('eigen', 'random', 'none')
#: Largest coordinate along eigenvectors, in lengths of the parameters; along random directions 1.
EIGEN_SPAN = 0.05


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    from .engine import launch
    from .loss_surface.loss import MODES
    from .loss_surface.products import WAYS

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
        '--product',
        choices=WAYS,
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
    launch.add_cfg_options(parser)
    return parser.parse_args()


def main() -> None:
    """Writes the files."""
    if find_module('mmengine') is None:
        sys.exit(
            'the command takes an MMEngine config, and MMEngine is not installed; in plain PyTorch '
            'call find_spectrum and find_surface of mmprecond.landscape'
        )
    from .engine import landscape_inputs, launch

    args = parse_args()
    if not logger.hasHandlers():
        logging.basicConfig(level=logging.INFO, format='%(message)s')
    with launch.one_line_errors():
        loss, optimizer = landscape_inputs.build(args)
        args.out.mkdir(parents=True, exist_ok=True)
        logger.info('%s', forecast(loss, args.steps))
        spectra = find_spectra(loss, optimizer, args)
        draw_spectra(spectra, args.out / 'spectrum.png')
        write_spectra(spectra, args.out / 'spectrum.csv')
        for name, spectrum in spectra.items():
            logger.info(
                '%s: eigenvalues from %.3g to %.3g, mean %.3g',
                name,
                spectrum.smallest,
                spectrum.largest,
                spectrum.mean,
            )
        if args.plane != 'none':
            write_plane(loss, next(iter(spectra.values())), args)
        logger.info('files in %s', args.out)


def forecast(loss: Loss, steps: int) -> str:
    """Sentence with the number of parameters and the memory of the Lanczos vectors."""
    megabytes = loss.size * loss.params[0].element_size() / 2**20
    return (
        f'{loss.size:,} parameters: at most {2 * steps} Lanczos vectors take '
        f'{2 * steps * megabytes:.0f} MB; loss {loss.value():.4g}'
    )


def find_spectra(
    loss: Loss, optimizer: torch.optim.Optimizer | None, args: argparse.Namespace
) -> dict[str, Spectrum]:
    """Spectrum of the Hessian, and of the Hessian under the optimizer's preconditioner."""
    from tqdm import tqdm

    product = choose_product(loss, args.product)
    metrics: dict[str, Callable[[Tensor], Tensor] | None] = {'Hessian': None}
    if optimizer is not None:
        try:
            metrics['preconditioned Hessian'] = preconditioner_of(optimizer, loss)
        except ValueError as error:
            logger.warning('no spectrum under the preconditioner: %s', error)
    spectra = {}
    for name, metric in metrics.items():
        with tqdm(total=args.runs * args.steps, desc=name) as bar:

            def counted(vector: Tensor, bar: Any = bar) -> Tensor:
                bar.update()
                return product(vector)

            spectra[name] = find_spectrum(
                counted, loss.point(), args.steps, args.runs, precondition=metric
            )
    return spectra


def write_plane(loss: Loss, spectrum: Spectrum, args: argparse.Namespace) -> None:
    """Writes the surface along the directions that the arguments name."""
    if args.plane == 'eigen' and len(spectrum.vectors) == 2:
        length = loss.point().norm()
        first, second = (vector / vector.norm() * length for vector in spectrum.vectors)
        span, labels = args.span or EIGEN_SPAN, ('first eigenvector', 'second eigenvector')
    else:
        first, second = random_directions(loss)
        span, labels = args.span or 1.0, ('first random direction', 'second random direction')
    surface = find_surface(loss, first, second, span, args.points, progress=True)
    draw_surface(surface, args.out / 'surface.png', labels)
    write_surface(surface, args.out / 'surface.csv')
    if find_module('plotly') is None:
        logger.info('surface.html needs plotly: pip install plotly')
    else:
        write_page(surface, args.out / 'surface.html', labels)


if __name__ == '__main__':
    main()
