"""Settings of optimizers: separation by owner, and named sets."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from ..checks import argument_names, check_choice, reject_unexpected
from ..core import CurvatureOptions
from ..preconditioners import SETS, Preconditioner

Method = TypeVar('Method', bound=Preconditioner)


def split_settings(
    owner: Any, method: type[Method], settings: dict[str, Any]
) -> tuple[Method, dict[str, Any]]:
    """Separates an optimizer's keyword arguments into preconditioner and options.

    Args:
        owner: The optimizer. Its `preset` has defaults that differ from those of the
            preconditioner. Its `published` has the literal settings that differ, and literal
            arguments of the optimizer itself.
        method: The preconditioner's class.
        settings: The user's settings. ``settings='published'`` starts from the literal settings.

    Returns:
        The preconditioner, and the options of `core.Curvature`.

    Raises:
        TypeError: If neither of them takes a setting.
        ValueError: If the named set is unknown.
    """
    overrides = dict(settings)
    named = overrides.pop('settings', 'default')
    check_choice('settings', named, SETS)
    known, option_names = method.options(), CurvatureOptions.names()
    options = dict(CurvatureOptions.published) if named == 'published' else {}
    options |= {key: overrides[key] for key in option_names if key in overrides}
    unexpected = {
        key: value
        for key, value in overrides.items()
        if key not in known and key not in option_names
    }
    reject_unexpected(
        type(owner).__name__,
        unexpected,
        [*argument_names(type(owner)), *known, *option_names, 'settings'],
    )
    base = owner.preset if named == 'default' else {**method.published, **owner.published}
    base = {key: value for key, value in base.items() if key in known}
    own = {key: value for key, value in overrides.items() if key in known}
    return method(**{**base, **own}, given=frozenset(own)), options


class FullSignature:
    """Signature of an optimizer's class with all that its ``**settings`` take, at their defaults.

    It is what `help`, `inspect.signature` and editors show.
    """

    def __get__(self, _: Any, owner: type[Any]) -> inspect.Signature | None:
        own = list(inspect.signature(owner.__init__).parameters.values())[1:]
        if not own or own[-1].kind is not inspect.Parameter.VAR_KEYWORD:
            return None
        method = getattr(owner, 'preconditioner', None)
        sources = [*(fields(method) if method else ()), *fields(CurvatureOptions)]
        defaults = {field.name: field.default for field in sources if field.name != 'given'}
        if method:
            defaults = {**defaults, **owner.preset, 'settings': 'default'}
        taken = {parameter.name for parameter in own[:-1]}
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, default in defaults.items()
            if name not in taken
        ]
        return inspect.Signature([*own[:-1], *more])


def takes_settings(init: Callable[..., None]) -> Callable[..., None]:
    """Decorates a constructor so that it takes ``settings='published'``.

    The class's `published` then replaces the defaults of arguments that are not given.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, settings: str = 'default', **kwargs: Any) -> None:
        check_choice('settings', settings, SETS)
        if settings == 'published':
            passed = signature.bind_partial(self, *args, **kwargs).arguments
            kwargs |= {
                key: value for key, value in type(self).published.items() if key not in passed
            }
        init(self, *args, **kwargs)

    named = inspect.Parameter('settings', inspect.Parameter.KEYWORD_ONLY, default='default')
    parameters = list(signature.parameters.values())
    last = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    parameters.insert(len(parameters) - last, named)
    vars(wrapped)['__signature__'] = signature.replace(parameters=parameters)
    return wrapped
