"""Preconditioning methods, one a file."""

from .attention import AttentionFeature
from .base import Preconditioner
from .feature import InputFeature
from .kronecker import KroneckerRoot, NewtonKronecker
from .stack import LayerStack, RefreshError

__all__ = ['AttentionFeature', 'InputFeature', 'KroneckerRoot', 'LayerStack', 'NewtonKronecker',
           'Preconditioner', 'RefreshError']

#: Methods that a config may name.
METHODS: dict[str, type[Preconditioner]] = {
    kind.__name__: kind for kind in (AttentionFeature, InputFeature, KroneckerRoot,
                                     NewtonKronecker)}
