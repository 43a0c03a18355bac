"""The loss around a model's weights: derivatives, spectra, and the loss along directions."""

from .draw import draw_spectra, draw_surface, write_page, write_spectra, write_surface
from .lanczos import Spectrum, find_spectrum, inverse_root, lanczos
from .loss import Loss
from .preconditioned import preconditioner_of
from .products import choose_product
from .surface import Surface, find_surface, random_directions

__all__ = [
    'Loss',
    'Spectrum',
    'Surface',
    'choose_product',
    'draw_spectra',
    'draw_surface',
    'find_spectrum',
    'find_surface',
    'inverse_root',
    'lanczos',
    'preconditioner_of',
    'random_directions',
    'write_page',
    'write_spectra',
    'write_surface',
]
