"""The rules that a config may name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from .adam import AdamW
from .adan import Adan
from .aro import ARORule
from .base import Group, Rule
from .dct import DCTAdamWRule
from .sgd import EMASGD, SGDM

#: Rules that a config may name.
RULES: dict[str, type[Rule]] = {rule.__name__.removesuffix('Rule'): rule for rule in (
    SGDM, EMASGD, AdamW, Adan, ARORule, DCTAdamWRule)}


def build_rule(config: Any, choices: Sequence[str] = tuple(RULES)) -> tuple[Rule, Group]:
    """Reads ``dict(type=..., lr=..., ...)``.

    Args:
        config: The rule's type, its options and its hyper-parameters.
        choices: Types to choose from.

    Returns:
        The rule, and hyper-parameters for all parameter groups.

    Raises:
        ValueError: For what cannot be read, with what to write instead.
    """
    names = ', '.join(choices)
    if not isinstance(config, dict) or 'type' not in config:
        raise ValueError(f'rule={config!r} has no type; write rule=dict(type=..., lr=...) with one '
                         f'of {names}')
    settings = dict(config)
    kind = settings.pop('type')
    if kind not in choices:
        raise ValueError(f'unknown rule {kind!r}; choose one of {names}')
    rule = RULES[kind]
    if 'lr' not in settings:
        raise ValueError(f"rule={config!r} has no lr; write rule=dict(type='{kind}', lr=...)")
    options = {key: settings.pop(key) for key in inspect.signature(rule).parameters
               if key in settings}
    unknown = sorted(set(settings) - set(rule.hyper))
    if unknown:
        raise ValueError(f'the rule {kind} does not take {", ".join(unknown)}; it takes '
                         f'{", ".join([*rule.hyper, *inspect.signature(rule).parameters])}')
    return rule(**options), {**rule.defaults, **settings}
