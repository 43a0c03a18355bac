"""Preconditioning methods, one a file."""

from .attention import AttentionFeature
from .base import Preconditioner
from .feature import InputFeature
from .kfac import FisherKronecker
from .kronecker import NewtonKronecker
from .root import KroneckerRoot
from .rotation import EigenRotation
from .stack import LayerStack, RefreshError

#: Methods that a config may name.
METHODS: dict[str, type[Preconditioner]] = {
    kind.__name__: kind for kind in (AttentionFeature, EigenRotation, FisherKronecker, InputFeature,
                                     KroneckerRoot, NewtonKronecker)}

__all__ = ['METHODS', 'AttentionFeature', 'EigenRotation', 'FisherKronecker', 'InputFeature',
           'KroneckerRoot', 'LayerStack', 'NewtonKronecker', 'Preconditioner', 'RefreshError']
