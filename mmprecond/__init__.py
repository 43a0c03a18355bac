"""mmprecond: preconditioned optimizers for MMDetection, MMPretrain and plain PyTorch.

The import registers every optimizer with MMEngine, if MMEngine is installed.
"""

from importlib.util import find_spec

from . import optimizers
from .optimizers import *  # noqa: F403
from .version import __version__

__all__ = ['__version__', *optimizers.__all__]

if find_spec('mmengine') is not None:
    from .engine import PrecondOptimWrapperConstructor, register_all

    register_all()
    __all__ += ['PrecondOptimWrapperConstructor']
