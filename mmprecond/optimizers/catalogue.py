"""Catalogue of the optimizers: their names, settings and sources."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from ..checks import did_you_mean
from ..core import CurvatureOptions
from .base import PreconditionedOptimizer
from .rule_optimizer import RuleOptimizer

#: Classes that other optimizers are made of.
BASES = (RuleOptimizer, PreconditionedOptimizer)
#: Optimizers whose arguments do not tell the size of their learning rates (see `has_adam_scale`).
ADAM_SCALE = {'AdaAct': False, 'AdaFisher': True, 'AdaFisherW': True, 'Adagrad': True}


@dataclass(frozen=True)
class OptimizerInfo:
    """Facts about an optimizer that is not built.

    Attributes:
        name: Name of the class, which configs take as `type`.
        kind: The class.
        description: First line of its docstring.
        settings: Defaults of all keyword arguments; `inspect.Parameter.empty` where one is needed.
        published: Settings that ``settings='published'`` changes, with their values.
        needs: Input beside gradients that a loop must supply (see `RuleOptimizer.needs`).
    """

    name: str
    kind: type[RuleOptimizer]
    description: str
    settings: Mapping[str, Any]
    published: Mapping[str, Any]
    needs: str


def list_optimizers(pattern: str = '*') -> list[str]:
    """Names of the optimizers, in alphabetical order.

    Args:
        pattern: Pattern as in `fnmatch`; upper and lower case are equal. Default: all.
    """
    return sorted(name for name in _kinds() if fnmatch(name.lower(), pattern.lower()))


def get_optimizer_info(name: str) -> OptimizerInfo:
    """Describes an optimizer.

    Args:
        name: Its name; upper and lower case are equal.

    Raises:
        ValueError: If the name is unknown; the message has the nearest names.
    """
    kinds = {known.lower(): kind for known, kind in _kinds().items()}
    kind = kinds.get(str(name).lower())
    if kind is None:
        names = list_optimizers()
        raise ValueError(
            f'unknown optimizer {name!r}; {did_you_mean(name, names)}'
            f'choose one of {", ".join(names)}'
        )
    parameters = list(inspect.signature(kind).parameters.values())
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != 'params']
    method = getattr(kind, 'preconditioner', None)
    literal = {**CurvatureOptions.published, **method.published} if method else {}
    return OptimizerInfo(
        kind.__name__,
        kind,
        (inspect.getdoc(kind) or '').splitlines()[0],
        {p.name: p.default for p in named},
        {**literal, **kind.published},
        kind.needs,
    )


def has_adam_scale(kind: type) -> bool:
    """True if an optimizer's learning rates are of the size of Adam's, rather than of SGD's.

    Args:
        kind: Class of this package, of torch or of another package.
    """
    known = ADAM_SCALE.get(kind.__name__)
    return 'betas' in inspect.signature(kind).parameters if known is None else known


def _kinds() -> dict[str, type[RuleOptimizer]]:
    """Optimizers of the package by name, without their base classes."""
    package = sys.modules[__package__ or '']
    members = ((name, getattr(package, name)) for name in package.__all__)
    return {
        name: kind
        for name, kind in members
        if isinstance(kind, type) and issubclass(kind, RuleOptimizer) and kind not in BASES
    }
