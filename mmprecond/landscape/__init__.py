"""The loss around a model's weights: derivatives, spectra, and the loss along directions."""

from .lanczos import Spectrum, find_spectrum, inverse_root, lanczos
from .loss import Loss
from .preconditioned import preconditioner_of

__all__ = ['Loss', 'Spectrum', 'find_spectrum', 'inverse_root', 'lanczos', 'preconditioner_of']
