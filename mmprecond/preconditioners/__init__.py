"""Preconditioning methods, one a file."""

from .attention import AttentionFeature
from .base import Preconditioner
from .feature import InputFeature
from .kronecker import NewtonKronecker
from .stack import LayerStack, RefreshError

__all__ = ['AttentionFeature', 'InputFeature', 'LayerStack', 'NewtonKronecker', 'Preconditioner',
           'RefreshError']

#: Methods that a config may name.
METHODS: dict[str, type[Preconditioner]] = {
    method.__name__: method for method in (AttentionFeature, InputFeature, NewtonKronecker)}
