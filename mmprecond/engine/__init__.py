"""MMEngine: constructor, wrapper, registration. The only subpackage that imports mmengine."""

from .constructor import PrecondOptimWrapperConstructor
from .hooks import CalibrationHook, CurvatureHook, LandscapeHook
from .presets import attach, use_optimizer
from .registration import register_all
from .wrapper import PrecondAmpOptimWrapper, PrecondOptimWrapper

__all__ = [
    'CalibrationHook',
    'CurvatureHook',
    'LandscapeHook',
    'PrecondAmpOptimWrapper',
    'PrecondOptimWrapper',
    'PrecondOptimWrapperConstructor',
    'attach',
    'register_all',
    'use_optimizer',
]
