"""Settings of optimizers: which are the preconditioner's, and which hold for all layers."""

from __future__ import annotations

from typing import Any, TypeVar

from ..checks import argument_names, reject_unexpected
from ..core import CurvatureOptions
from ..preconditioners import Preconditioner

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
    own = {key: settings[key] for key in CurvatureOptions.names() if key in settings}
    unexpected = {key: value for key, value in settings.items()
                  if key not in known and key not in own}
    reject_unexpected(type(owner).__name__, unexpected,
                      [*argument_names(type(owner)), *known, *CurvatureOptions.names()])
    chosen = {key: value for key, value in settings.items() if key in known}
    return method(**{**defaults, **chosen}), own
