"""mmprecond: preconditioned optimizers for MMDetection, MMPretrain and plain PyTorch.

The import registers every optimizer with MMEngine, if MMEngine is installed.
"""

from importlib.util import find_spec

from torch import __version__ as _torch_version

from .version import __version__, check_torch

check_torch(_torch_version)

from . import optimizers  # noqa: E402
from .optimizers import *  # noqa: E402, F403

__all__ = ['__version__', *optimizers.__all__]

if find_spec('mmengine') is not None:
    from .engine import (
        CalibrationHook,
        CurvatureHook,
        LandscapeHook,
        PrecondOptimWrapperConstructor,
        register_all,
    )

    register_all()
    # Configs may name them with the package's name too: `type='mmprecond.CurvatureHook'`.
    __all__ += [
        'CalibrationHook',
        'CurvatureHook',
        'LandscapeHook',
        'PrecondOptimWrapperConstructor',
    ]
