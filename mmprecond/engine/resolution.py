"""Resolution of the types that configs name."""

from __future__ import annotations

from typing import Any

from mmengine.registry import Registry

from ..checks import did_you_mean


def class_name(kind: Any) -> str:
    """Name of the class that a config gives as `type`: the class, its name or a dotted path."""
    return getattr(kind, '__name__', str(kind)).split('.')[-1]


def resolve(registry: Registry, kind: Any) -> Any:
    """Class that a config's `type` names, in the run's scope or by its dotted path.

    Raises:
        KeyError: If the type is not registered.
    """
    if not isinstance(kind, str):
        return kind
    with registry.switch_scope_and_registry(None) as scoped:
        resolved = scoped.get(kind)
    if resolved is None:
        near = did_you_mean(kind, {**registry.module_dict, **scoped.module_dict})
        raise KeyError(
            f'{kind} is not registered as {registry.name}; {near}is the package that defines '
            'it named in custom_imports?'
        )
    return resolved
