"""Rules that a config may name, and their registration."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from .adam import AdamW
from .adan import Adan
from .adaptive import AdaBelief, AdaGrad, RAdam
from .aro import ARORule
from .base import Group, Rule
from .dct import DCTAdamWRule
from .ramda import RAMDARule
from .sgd import EMASGD, SGDM

#: Rules that a config may name.
RULES: dict[str, type[Rule]] = {
    rule.__name__.removesuffix('Rule'): rule
    for rule in (
        SGDM,
        EMASGD,
        AdamW,
        Adan,
        AdaGrad,
        RAdam,
        AdaBelief,
        ARORule,
        DCTAdamWRule,
        RAMDARule,
    )
}
#: Rules that AdamR, AdaNKFAC, SOAP and the other optimizers like Adam accept as `rule`.
ADAPTIVE = ('AdamW', 'Adan', 'AdaGrad', 'RAdam', 'AdaBelief')


def rule_name(rule: type[Rule]) -> str:
    """Name of a rule in configs."""
    return next((name for name, kind in RULES.items() if kind is rule), rule.__name__)


def register_rule(rule: type[Rule], name: str | None = None) -> type[Rule]:
    """Registers a rule for configs; also a decorator.

    Args:
        rule: The rule's class.
        name: Name in configs; default: the name of the class without a trailing 'Rule'.

    Returns:
        The class.

    Raises:
        TypeError: If it is no complete subclass of `Rule`.
        ValueError: If another rule has the name, `hyper` lacks 'lr' or 'weight_decay', or a
            hyper-parameter has no default.
    """
    if not (isinstance(rule, type) and issubclass(rule, Rule)):
        raise TypeError(f'register_rule takes a subclass of Rule, not {rule!r}')
    missing = sorted(getattr(rule, '__abstractmethods__', ()))
    if missing:
        raise TypeError(f'{rule.__name__} must define {", ".join(missing)}')
    name = rule.__name__.removesuffix('Rule') if name is None else name
    if not isinstance(name, str) or not name:
        raise TypeError(f'name={name!r} is no name')
    if RULES.get(name, rule) is not rule:
        raise ValueError(
            f'the name {name!r} belongs to {RULES[name].__module__}.'
            f'{RULES[name].__qualname__}; give another by name=...'
        )
    lacking = [key for key in ('lr', 'weight_decay') if key not in rule.hyper]
    if lacking:
        raise ValueError(
            f'{rule.__name__}.hyper has no {", ".join(lacking)}, which schedules and '
            'parameter groups set'
        )
    unset = [key for key in rule.hyper if key != 'lr' and key not in rule.defaults]
    if unset:
        raise ValueError(f'{rule.__name__}.defaults has no {", ".join(unset)}')
    RULES[name] = rule
    return rule


def build_rule(config: Any, choices: Sequence[str] | None = None) -> tuple[Rule, Group]:
    """Reads ``dict(type=..., lr=..., ...)``.

    Args:
        config: The rule's type, its options and its hyper-parameters.
        choices: Names of the possible types; default: all.

    Returns:
        The rule, and hyper-parameters for all parameter groups.

    Raises:
        ValueError: If the config is invalid; the message says what to write instead.
    """
    choices = list(RULES) if choices is None else choices
    names = ', '.join(choices)
    if not isinstance(config, dict) or 'type' not in config:
        raise ValueError(
            f'rule={config!r} has no type; write rule=dict(type=..., lr=...) with one of {names}'
        )
    settings = dict(config)
    kind = settings.pop('type')
    if kind not in choices:
        raise ValueError(f'unknown rule {kind!r}; choose one of {names}')
    rule = RULES[kind]
    if 'lr' not in settings:
        raise ValueError(f"rule={config!r} has no lr; write rule=dict(type='{kind}', lr=...)")
    options = {
        key: settings.pop(key) for key in inspect.signature(rule).parameters if key in settings
    }
    unknown = sorted(set(settings) - set(rule.hyper))
    if unknown:
        raise ValueError(
            f'the rule {kind} does not take {", ".join(unknown)}; it takes '
            f'{", ".join([*rule.hyper, *inspect.signature(rule).parameters])}'
        )
    return rule(**options), {**rule.defaults, **settings}
