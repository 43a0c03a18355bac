"""Checks of the names in a config: hooks, schedulers, the optimizer wrapper, `custom_keys`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, OPTIM_WRAPPERS, PARAM_SCHEDULERS, Registry

from ..checks import did_you_mean
from ..optimizers.groups import GROUP_KEYS
from .resolution import resolve

#: Entries of a parameter group that schedulers change.
SCHEDULED = ('lr', 'momentum', 'weight_decay', 'damping', 'betas', 'eps')
#: Settings of one key of `custom_keys`, of MMEngine and of this package.
CUSTOM = ('lr_mult', 'decay_mult', *GROUP_KEYS)
#: Settings of `clip_grad`.
CLIPPING = ('type', 'max_norm', 'norm_type', 'error_if_nonfinite', 'foreach', 'clip_value')


def check_types(cfg: Config) -> None:
    """Raises KeyError, TypeError or ValueError for a misspelt type or setting."""
    for hook in cfg.get('custom_hooks') or ():
        if isinstance(hook, str):
            raise ValueError(
                f'custom_hooks has the text {hook!r}; --cfg-options cannot hold a dict, so write '
                'the hook into a config file'
            )
        if isinstance(hook, dict):
            _check_entry(HOOKS, hook)
    for hook in (cfg.get('default_hooks') or {}).values():
        if isinstance(hook, dict):
            _check_entry(HOOKS, hook)
    schedulers = cfg.get('param_scheduler') or ()
    for scheduler in [schedulers] if isinstance(schedulers, dict) else schedulers:
        if isinstance(scheduler, dict) and 'type' in scheduler:
            _check_scheduler(scheduler)
    wrapper = cfg.get('optim_wrapper')
    if isinstance(wrapper, dict):
        resolve(OPTIM_WRAPPERS, wrapper.get('type', 'OptimWrapper'))
        _reject_near('optim_wrapper.clip_grad', wrapper.get('clip_grad') or {}, CLIPPING)
        keys = (wrapper.get('paramwise_cfg') or {}).get('custom_keys') or {}
        for key, settings in keys.items():
            if isinstance(settings, dict):
                _reject_near(f'custom_keys[{key!r}]', settings, CUSTOM)


def _check_scheduler(scheduler: dict[str, Any]) -> None:
    _check_entry(PARAM_SCHEDULERS, scheduler)
    name = scheduler.get('param_name', 'lr')
    if name not in SCHEDULED and (near := did_you_mean(name, SCHEDULED, 0.7)):
        raise ValueError(f'param_scheduler has param_name={name!r}; {near.rstrip()}')


def _check_entry(registry: Registry, entry: dict[str, Any]) -> None:
    """Raises an error for a type that is not registered, or an argument that it does not take."""
    kind = resolve(registry, entry['type'])
    if not inspect.isclass(kind):
        return
    known = _arguments_of(kind)
    if known is None or not issubclass(kind, Hook):
        return  # schedulers by epochs pass further arguments on
    unknown = [key for key in entry if key not in (*known, 'type', '_scope_', 'priority')]
    if unknown:
        near = ''.join(did_you_mean(key, known) for key in unknown)
        raise TypeError(
            f'{kind.__name__} does not take {", ".join(unknown)}; {near}it takes '
            f'{", ".join(known) or "nothing"}'
        )


def _arguments_of(kind: type) -> list[str] | None:
    """Names of a class's arguments; None if it takes any."""
    parameters = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values()):
        return None
    return [name for name in parameters if name != 'self']


def _reject_near(where: str, settings: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raises ValueError for a key that looks like a misspelt one; others may be meant."""
    for key in settings:
        if key not in known and (near := did_you_mean(key, known, 0.85)):
            raise ValueError(f'{where} has {key}; {near.rstrip()}')
