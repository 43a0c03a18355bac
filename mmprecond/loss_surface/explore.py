"""Files about the loss around a model's weights: spectra, and a surface."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec as find_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_installed, reject_unexpected
from .draw import draw_spectra, draw_surface, write_page, write_spectra, write_surface
from .lanczos import Product, Spectrum, find_spectrum
from .loss import Loss
from .preconditioned import preconditioner_of
from .products import MATRICES, PRODUCTS, choose_product
from .surface import Surface, find_surface, random_directions

logger = logging.getLogger('mmprecond')

#: Directions of the surface.
PLANES = ('eigen', 'random', 'none')
#: Largest coordinate along eigenvectors, in lengths of the parameters; along random directions 1.
EIGEN_SPAN = 0.05
#: Titles of the matrices.
TITLES = {'hessian': 'Hessian', 'gauss-newton': 'Gauss-Newton matrix'}


def explore(
    loss: Loss,
    folder: str | Path | None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    matrix: str = 'hessian',
    product: str = 'auto',
    steps: int = 30,
    runs: int = 2,
    plane: str = 'eigen',
    span: float | None = None,
    points: int = 15,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Spectrum]:
    """Writes spectra and a surface of the loss around the present weights.

    The files are spectrum.png and spectrum.csv, and for a surface surface.png, surface.csv and
    (with plotly) surface.html. The log says how many vectors are kept, and what was found.

    Args:
        loss: The loss.
        folder: Folder of the files, which is made; None for no files.
        optimizer: With an optimizer that has a map P (see `preconditioner_of`), the spectrum of P
            times the matrix is found too. Otherwise the log says why not.
        matrix: 'hessian' (default) or 'gauss-newton'.
        product: How the Hessian is multiplied: see `choose_product`.
        steps: Lanczos steps of a run.
        runs: Random runs.
        plane: Directions of the surface: 'eigen' (default), the eigenvectors of the two values
            largest in absolute size; 'random', two random directions normalised by filter; 'none',
            no surface.
        span: Largest coordinate of the surface; default: 0.05 lengths of the parameters along
            eigenvectors, 1 along random directions.
        points: Points on a side of the surface.
        seed: Seed of the Lanczos start vectors and of random directions.
        progress: Whether to show progress bars, which need tqdm.

    Returns:
        The spectra by title: 'Hessian' or 'Gauss-Newton matrix', and 'preconditioned ...'.

    Raises:
        ValueError: If a setting is invalid, or the loss has no Gauss-Newton matrix.
        ImportError: If matplotlib, tqdm (for progress bars) or curvlinops is missing.
    """
    check_settings(dict(plane=plane, matrix=matrix, product=product, progress=progress))
    logger.info('%s', forecast(loss, steps))
    multiply = choose_product(loss, product, matrix)
    spectra = {}
    for name, metric in _metrics(loss, optimizer, TITLES[matrix]).items():
        with _counted(multiply, runs * steps, name, progress) as counted:
            spectra[name] = find_spectrum(
                counted, loss.parameter_vector(), steps, runs, seed, precondition=metric
            )
        spectrum = spectra[name]
        logger.info(
            '%s: eigenvalues from %.3g to %.3g, mean %.3g',
            name,
            spectrum.smallest,
            spectrum.largest,
            spectrum.mean,
        )
    plain = next(iter(spectra.values())) if plane == 'eigen' else None
    surface = None if plane == 'none' else _find_plane(loss, plain, span, points, seed, progress)
    if folder is not None:
        _write_files(Path(folder), spectra, surface)
    return spectra


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises the errors of `explore` for settings that can be found without a loss."""
    known = [name for name in signature(explore).parameters if name not in ('loss', 'folder')]
    reject_unexpected('explore', {k: v for k, v in settings.items() if k not in known}, known)
    for name, choices in (('plane', PLANES), ('matrix', MATRICES), ('product', PRODUCTS)):
        check_choice(name, settings.get(name, choices[0]), choices)
    check_installed('matplotlib', 'a picture of a spectrum')
    if settings.get('progress', True):
        check_installed('tqdm', 'a progress bar')
    if settings.get('matrix') == 'gauss-newton':
        check_installed('curvlinops', 'the Gauss-Newton matrix', 'curvlinops-for-pytorch')


def forecast(loss: Loss, steps: int) -> str:
    """Sentence with the number of parameters and the memory of the Lanczos vectors."""
    megabytes = loss.size * loss.params[0].element_size() / 2**20
    return (
        f'{loss.size:,} parameters: at most {2 * steps} Lanczos vectors take '
        f'{2 * steps * megabytes:.0f} MB; loss {loss.value():.4g}'
    )


def _metrics(
    loss: Loss, optimizer: torch.optim.Optimizer | None, title: str
) -> dict[str, Callable[[Tensor], Tensor] | None]:
    """Maps P by the titles of the spectra; None for the plain one."""
    metrics: dict[str, Callable[[Tensor], Tensor] | None] = {title: None}
    if optimizer is not None:
        try:
            metrics[f'preconditioned {title}'] = preconditioner_of(optimizer, loss)
        except ValueError as error:
            logger.warning('no spectrum under the preconditioner: %s', error)
    return metrics


@contextmanager
def _counted(product: Product, calls: int, name: str, progress: bool) -> Iterator[Product]:
    """Product that moves a progress bar of some calls."""
    if not progress:
        yield product
        return
    from tqdm import tqdm

    with tqdm(total=calls, desc=name) as bar:

        def counted(vector: Tensor) -> Tensor:
            bar.update()
            return product(vector)

        yield counted


def _find_plane(
    loss: Loss,
    spectrum: Spectrum | None,
    span: float | None,
    points: int,
    seed: int,
    progress: bool,
) -> tuple[Surface, tuple[str, str]]:
    """Surface along a spectrum's leading vectors or random directions, and labels of its axes."""
    if spectrum is not None and len(spectrum.vectors) == 2:
        length = loss.parameter_vector().norm()
        first, second = (vector / vector.norm() * length for vector in spectrum.vectors)
        kind, usual = 'eigenvector', EIGEN_SPAN
    else:
        first, second = random_directions(loss, seed)
        kind, usual = 'random direction', 1.0
    span = usual if span is None else span
    surface = find_surface(loss, first, second, span, points, progress)
    return surface, (f'first {kind}', f'second {kind}')


def _write_files(
    folder: Path, spectra: Mapping[str, Spectrum], plane: tuple[Surface, tuple[str, str]] | None
) -> None:
    """Writes pictures, tables and the page."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_spectra(spectra, folder / 'spectrum.png')
    write_spectra(spectra, folder / 'spectrum.csv')
    logger.info('files in %s', folder)
    if plane is None:
        return
    surface, labels = plane
    draw_surface(surface, folder / 'surface.png', labels)
    write_surface(surface, folder / 'surface.csv')
    if find_module('plotly') is None:
        logger.info('surface.html needs plotly: pip install plotly')
    else:
        write_page(surface, folder / 'surface.html', labels)
