"""Preconditioners that a config may name, and their registration."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, TypeVar

from ..checks import check_choice, did_you_mean
from .base import Preconditioner
from .statistic_checks import check_statistics

#: Named sets of settings: our recommendation, and the settings behind published numbers.
SETS = ('default', 'published')

#: Methods that a config may name.
METHODS: dict[str, type[Preconditioner]] = {}

Method = TypeVar('Method', bound=type[Preconditioner])


def register_preconditioner(method: Method, name: str | None = None) -> Method:
    """Registers a preconditioner for configs; also a decorator, above ``@dataclass``.

    Args:
        method: The preconditioner's class.
        name: Name in configs; default: the name of the class.

    Returns:
        The class.

    Raises:
        TypeError: If it is no complete subclass of `Preconditioner`, is not itself a dataclass, or
            lists something else among its statistics.
        ValueError: If another class has the name, a setting has no default, or `published` has
            unknown settings.
    """
    if not (isinstance(method, type) and issubclass(method, Preconditioner)):
        raise TypeError(
            f'register_preconditioner takes a subclass of Preconditioner, not {method!r}'
        )
    missing = sorted(getattr(method, '__abstractmethods__', ()))
    if missing:
        raise TypeError(f'{method.__name__} must define {", ".join(missing)}')
    if '__dataclass_fields__' not in vars(method):
        raise TypeError(
            f'{method.__name__} is no dataclass of its own; write '
            '@dataclass(frozen=True, kw_only=True) above it'
        )
    check_statistics(method.__name__, method.statistics)
    open_settings = [
        field.name
        for field in fields(method)
        if field.default is MISSING and field.default_factory is MISSING
    ]
    if open_settings:
        raise ValueError(f'{method.__name__} has no default for {", ".join(open_settings)}')
    for named, settings in (('published', method.published), *method.variants.items()):
        unknown = sorted(set(settings) - set(method.options()))
        if unknown:
            raise ValueError(
                f'{named} of {method.__name__} names {", ".join(unknown)}, no settings of it'
            )
    name = method.__name__ if name is None else name
    if not isinstance(name, str) or not name:
        raise TypeError(f'name={name!r} is no name')
    if METHODS.get(name, method) is not method:
        raise ValueError(
            f'the name {name!r} belongs to {METHODS[name].__module__}.'
            f'{METHODS[name].__qualname__}; give another by name=...'
        )
    METHODS[name] = method
    return method


def find_method(name: Any) -> tuple[type[Preconditioner], dict[str, Any]]:
    """Preconditioner that a config names: by its class, its class's name, or a word.

    Returns:
        The class, and the settings that a word stands for ('SKFAC' is a form of KFAC).

    Raises:
        ValueError: If the name is unknown; the message has the nearest names.
    """
    if isinstance(name, type) and issubclass(name, Preconditioner):
        return name, {}
    words: dict[str, tuple[type[Preconditioner], dict[str, Any]]] = {}
    for method in METHODS.values():
        own = vars(method)  # a subclass does not take its parent's words
        words |= {own['word']: (method, {})} if 'word' in own else {}
        words |= {word: (method, preset) for word, preset in own.get('variants', {}).items()}
    if isinstance(name, str) and name in METHODS:
        return METHODS[name], {}
    if isinstance(name, str) and name in words:
        return words[name]
    names = [*sorted(words), *sorted(METHODS)]
    raise ValueError(
        f'unknown preconditioner type {name!r}; {did_you_mean(name, names)}choose one of '
        f'{", ".join(names)}'
    )


def build_preconditioner(
    method: type[Preconditioner], settings: dict[str, Any], preset: dict[str, Any]
) -> Preconditioner:
    """Builds a preconditioner.

    Args:
        method: Its class.
        settings: The user's settings; ``settings='published'`` starts from that named set.
        preset: Settings of the method's form, which the user's override.
    """
    overrides = dict(settings)
    named = overrides.pop('settings', 'default')
    check_choice('settings', named, SETS)
    base = method.published if named == 'published' else {}
    return method(**{**base, **preset, **overrides}, given=frozenset(overrides))
