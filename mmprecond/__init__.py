"""mmprecond: preconditioned optimizers for MMDetection, MMPretrain and plain PyTorch.

Importing it registers every optimizer with MMEngine, where that is installed.
"""

from importlib.util import find_spec

from .optimizers import NKFAC, AdaNKFAC, PreconditionedOptimizer
from .version import __version__

__all__ = ['NKFAC', 'AdaNKFAC', 'PreconditionedOptimizer', '__version__']

if find_spec('mmengine') is not None:
    from .engine import PrecondOptimWrapperConstructor, register_all

    register_all()
    __all__ += ['PrecondOptimWrapperConstructor']
