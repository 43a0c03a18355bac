"""Selection of the base constructor by the keys of `paramwise_cfg`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS


def find_base(paramwise_cfg: dict[str, Any] | None, *, strict: bool = True) -> type:
    """Finds the constructor that reads all keys of a `paramwise_cfg`.

    MMEngine's default constructor comes first. It ignores some keys, such as those of layer decay;
    then the toolboxes' registered constructors are searched.

    Args:
        paramwise_cfg: Settings of parameter groups, or None.
        strict: Whether to raise an error if not exactly one constructor reads all keys (default:
            True). Otherwise MMEngine's is returned.

    Returns:
        The constructor's class.

    Raises:
        ValueError: If `strict`, and no registered constructor or more than one reads all keys.
    """
    keys = set(paramwise_cfg or {})
    ignored = sorted(keys - _strings_in(DefaultOptimWrapperConstructor))
    if not ignored:
        return DefaultOptimWrapperConstructor
    with OPTIM_WRAPPER_CONSTRUCTORS.switch_scope_and_registry(None) as scoped:
        scoped.import_from_location()
        known = {**OPTIM_WRAPPER_CONSTRUCTORS.module_dict, **scoped.module_dict}
    kinds = [kind for kind in known.values() if inspect.isclass(kind) and keys <= _strings_in(kind)]
    # A deprecated name of a constructor is a subclass of it.
    bases = [kind for kind in kinds if not set(kind.__mro__[1:]) & set(kinds)]
    if len(bases) != 1 and not strict:
        return DefaultOptimWrapperConstructor
    if len(bases) != 1:
        names = ', '.join(kind.__name__ for kind in bases) or 'none is registered'
        raise ValueError(
            f'DefaultOptimWrapperConstructor ignores {", ".join(ignored)} of paramwise_cfg; name '
            f"one that reads it by base_constructor='...' in optim_wrapper (candidates: {names})"
        )
    print_log(
        f'{bases[0].__name__} makes the parameter groups, because paramwise_cfg has '
        f'{", ".join(ignored)}',
        logger='current',
    )
    return bases[0]


def _strings_in(kind: type) -> set[str]:
    """String constants in the methods of a class and its bases: keys that it may read."""
    functions = [
        member
        for base in kind.__mro__
        for member in vars(base).values()
        if inspect.isfunction(member)
    ]
    return {text for function in functions for text in _constants(function.__code__)}


def _constants(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _constants(constant)
        parts = constant if isinstance(constant, (tuple, frozenset)) else (constant,)
        yield from (part for part in parts if isinstance(part, str))
