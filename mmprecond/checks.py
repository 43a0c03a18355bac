"""Argument checks with one-line errors that say what to write instead."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from importlib.util import find_spec
from numbers import Real
from typing import Any

import numpy as np


def check_number(
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float | None = None,
    open_low: bool = False,
    finite: bool = True,
) -> None:
    """Raises ValueError unless low <= value (< high); `open_low` excludes low itself."""
    if hasattr(value, 'item') and not isinstance(value, Real):
        raise ValueError(
            f'{name} is a {type(value).__name__}; give a number, such as {name}.item()'
        )
    number = (
        isinstance(value, Real)
        and not isinstance(value, bool)
        and (abs(float(value)) < float('inf') or not finite)
    )
    above = number and (float(value) > low if open_low else float(value) >= low)
    if not (above and (high is None or float(value) < high)):
        bound = f'greater than {low:g}' if open_low else f'at least {low:g}'
        below = '' if high is None else f' and less than {high:g}'
        raise ValueError(f'{name}={value!r} is out of range; give a number {bound}{below}')


def plain_numbers(value: Any) -> Any:
    """The value with numbers of Python in place of numpy's, also in tuples and lists."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (tuple, list):
        return type(value)(map(plain_numbers, value))
    return value


class PlainNumbers:
    """Base of dataclasses whose fields take numbers of numpy and hold Python's."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = plain_numbers(getattr(self, field.name))
            object.__setattr__(self, field.name, value)  # the dataclass may be frozen


def check_count(name: str, value: Any, low: int = 1) -> None:
    """Raises ValueError unless value is an integer of at least `low`."""
    if isinstance(value, np.integer):
        raise ValueError(f'{name} is a {type(value).__name__} of numpy; give int({value})')
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f'{name}={value!r} is out of range; give an integer of at least {low}')


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError unless value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f'{name}={value!r} is neither True nor False')


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises ValueError unless value is one of the choices."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f'{name}={value!r} is unknown; choose one of {", ".join(choices)}')


def check_installed(module: str, purpose: str, package: str | None = None) -> None:
    """Raises ImportError, with the command that installs it, if an optional module is missing."""
    if find_spec(module) is None:
        raise ImportError(f'{purpose} needs {module}: pip install {package or module}')


def argument_names(kind: type) -> list[str]:
    """Names of the keyword arguments of a class's constructor, without `params`."""
    signature = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    return [
        name
        for name, p in signature.items()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and name not in ('self', 'params')
    ]


def reject_unexpected(owner: str, unexpected: dict[str, Any], known: Iterable[str]) -> None:
    """Raises TypeError for unexpected keyword arguments, with their likely origin."""
    if unexpected:
        known = list(known)
        keys = ', '.join(sorted(unexpected))
        near = ''.join(did_you_mean(key, known) for key in sorted(unexpected))
        hint = (
            'MMEngine removes `_delete_` only from configs with a `_base_`: leave it out here'
            if '_delete_' in unexpected
            else 'if a base config left the key behind, add '
            '`_delete_=True` to the optimizer of your config'
        )
        raise TypeError(f'{owner} does not take {keys}; {near}{hint} (it takes {", ".join(known)})')


def first_names(names: Iterable[str], limit: int = 5) -> str:
    """``'a, b and 3 more'``: the first names, and the number of all others."""
    names = list(names)
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more


def first_line(error: Exception) -> str:
    """Kind of an error, with the first line of its text if it has one."""
    return f'{type(error).__name__}: {error}'.splitlines()[0].removesuffix(': ')


def did_you_mean(name: Any, names: Iterable[str], likeness: float = 0.6) -> str:
    """``'did you mean A or B? '`` with the nearest names, or ''; upper and lower case are equal.

    Args:
        name: The unknown name.
        names: The known names.
        likeness: Least likeness of a name, in [0, 1]; default: 0.6, as in `difflib`.
    """
    by_key = {known.lower(): known for known in names}
    near = get_close_matches(str(name).lower(), by_key, 3, likeness)
    return f'did you mean {" or ".join(by_key[key] for key in near)}? ' if near else ''
