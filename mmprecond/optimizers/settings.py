"""Settings of optimizers: which are the preconditioner's, and which the engine's."""

from __future__ import annotations

from typing import Any, TypeVar

from ..checks import argument_names, reject_unexpected
from ..preconditioners import Preconditioner

#: Settings of the optimizer itself, beside its rule's and its preconditioner's.
ENGINE_OPTIONS = ('capture_mb', 'save_curvature', 'sharding', 'clip_update', 'check_memory',
                  'stagger', 'matmul_precision')


Method = TypeVar('Method', bound=Preconditioner)


def split_settings(owner: object, method: type[Method], settings: dict[str, Any],
                   **defaults: Any) -> tuple[Method, dict[str, Any]]:
    """Separates an optimizer's keyword arguments.

    Args:
        owner: The optimizer, named in errors.
        method: The preconditioner's class.
        settings: What the user gave.
        **defaults: Settings whose default differs from the preconditioner's own.

    Returns:
        The preconditioner, and the arguments of `PreconditionedOptimizer`.

    Raises:
        TypeError: For a setting that neither takes.
    """
    known = method.options()
    own = {key: settings[key] for key in ENGINE_OPTIONS if key in settings}
    unexpected = {key: value for key, value in settings.items()
                  if key not in known and key not in own}
    reject_unexpected(type(owner).__name__, unexpected,
                      [*argument_names(type(owner)), *known, *ENGINE_OPTIONS])
    chosen = {key: value for key, value in settings.items() if key in known}
    return method(**{**defaults, **chosen}), own
