"""The loss around a model's weights: derivatives, spectra, and the loss along directions."""

from .draw import draw_spectra, draw_surface, write_page, write_spectra, write_surface
from .explore import explore
from .lanczos import Spectrum, find_spectrum, inverse_root, lanczos
from .loss import Loss, OutputLoss
from .preconditioned import preconditioner_of
from .products import choose_product
from .stability import StableRate, largest_rate
from .surface import Surface, find_surface, random_directions

__all__ = [
    'Loss',
    'Spectrum',
    'OutputLoss',
    'StableRate',
    'Surface',
    'choose_product',
    'draw_spectra',
    'draw_surface',
    'explore',
    'find_spectrum',
    'find_surface',
    'inverse_root',
    'lanczos',
    'largest_rate',
    'preconditioner_of',
    'random_directions',
    'write_page',
    'write_spectra',
    'write_surface',
]
