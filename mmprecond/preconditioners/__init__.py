"""Preconditioning methods, one a file."""

from .base import Preconditioner
from .kronecker import NewtonKronecker
from .stack import LayerStack, RefreshError

__all__ = ['LayerStack', 'NewtonKronecker', 'Preconditioner', 'RefreshError']
