"""Preconditioning methods, one a file."""

from .attention import AttentionFeature
from .base import Preconditioner
from .diagonal import FisherDiagonal, InputDiagonal
from .feature import InputFeature
from .kfac import FisherKronecker
from .kronecker import NewtonKronecker
from .mean import ActivationMean, CalibratedInput
from .nystrom import NystromFeature
from .root import KroneckerRoot
from .rotation import EigenRotation
from .stack import LayerStack, RefreshError

#: Methods that a config may name.
METHODS: dict[str, type[Preconditioner]] = {
    kind.__name__: kind for kind in (
        ActivationMean, AttentionFeature, EigenRotation, FisherDiagonal, FisherKronecker,
        InputDiagonal, InputFeature, KroneckerRoot, NewtonKronecker, NystromFeature)}

__all__ = ['METHODS', 'ActivationMean', 'AttentionFeature', 'CalibratedInput', 'EigenRotation',
           'FisherDiagonal', 'FisherKronecker', 'InputDiagonal', 'InputFeature', 'KroneckerRoot',
           'LayerStack', 'NewtonKronecker', 'NystromFeature', 'Preconditioner', 'RefreshError']
