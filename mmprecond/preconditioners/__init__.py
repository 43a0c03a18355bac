"""Preconditioning methods, one a file."""

from .activation_mean import ActivationMean
from .attention_feature import AttentionFeature
from .base import Preconditioner, RefreshError
from .calibrated_input import CalibratedInput
from .eigen_rotation import EigenRotation
from .fisher_diagonal import FisherDiagonal
from .fisher_kronecker import FisherKronecker
from .gradient_root import GradientRoot
from .gradient_rotation import GradientRotation
from .input_diagonal import InputDiagonal
from .input_feature import InputFeature
from .kronecker_root import KroneckerRoot
from .newton_kronecker import NewtonKronecker
from .nystrom_feature import NystromFeature
from .registry import METHODS, SETS, build_preconditioner, find_method, register_preconditioner
from .statistic_checks import check_statistics

__all__ = [
    'METHODS',
    'SETS',
    'ActivationMean',
    'AttentionFeature',
    'CalibratedInput',
    'EigenRotation',
    'FisherDiagonal',
    'FisherKronecker',
    'GradientRoot',
    'GradientRotation',
    'InputDiagonal',
    'InputFeature',
    'KroneckerRoot',
    'NewtonKronecker',
    'NystromFeature',
    'Preconditioner',
    'RefreshError',
    'build_preconditioner',
    'check_statistics',
    'find_method',
    'register_preconditioner',
]
