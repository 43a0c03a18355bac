"""Registration with MMEngine's root registries, where every scope finds the optimizers."""

from __future__ import annotations

import logging
from typing import Any

from mmengine.logging import MMLogger, print_log
from mmengine.registry import (
    HOOKS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    Registry,
)

from .. import optimizers
from ..optimizers import PreconditionedOptimizer, RuleOptimizer, WeightNormConv2d
from .constructor import PrecondOptimWrapperConstructor
from .hooks import CalibrationHook, CurvatureHook, LandscapeHook
from .wrapper import PrecondAmpOptimWrapper, PrecondOptimWrapper


def optimizer_types() -> list[type[RuleOptimizer]]:
    """Optimizers that a config may name."""
    bases = (RuleOptimizer, PreconditionedOptimizer)
    named = (getattr(optimizers, name) for name in optimizers.__all__)
    return [
        kind
        for kind in named
        if isinstance(kind, type) and issubclass(kind, RuleOptimizer) and kind not in bases
    ]


class _MMEngineHandler(logging.Handler):
    """Handler that passes the package's log to the current MMLogger and its files."""

    def emit(self, record: logging.LogRecord) -> None:
        # Without a runner, whose logger has another name, the user's own handlers have it already.
        default = MMLogger.get_current_instance().instance_name == 'mmengine'
        if default and logging.getLogger().handlers:
            return
        print_log(self.format(record), logger='current', level=record.levelno)


def register_all() -> None:
    """Registers optimizers, wrappers, hooks and modules once; a second call changes nothing.

    Raises:
        KeyError: If another package has registered one of the names; the message names both.
    """
    for kind in optimizer_types():
        _register(OPTIMIZERS, kind)
    _register(OPTIM_WRAPPER_CONSTRUCTORS, PrecondOptimWrapperConstructor)
    for wrapper in (PrecondOptimWrapper, PrecondAmpOptimWrapper):
        _register(OPTIM_WRAPPERS, wrapper)
    _register(MODELS, WeightNormConv2d)
    for hook in (CalibrationHook, CurvatureHook, LandscapeHook):
        _register(HOOKS, hook)
    logger = logging.getLogger('mmprecond')
    if not any(isinstance(handler, _MMEngineHandler) for handler in logger.handlers):
        logger.addHandler(_MMEngineHandler())
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)


def _register(registry: Registry, kind: type[Any]) -> None:
    present = registry.module_dict.get(kind.__name__)
    if present is None:
        registry.register_module(module=kind)
    elif present is not kind:
        raise KeyError(
            f'{kind.__name__} is registered in {registry.name!r} by {present.__module__} already, '
            f'so {kind.__module__} cannot register it; import only one of the two'
        )
