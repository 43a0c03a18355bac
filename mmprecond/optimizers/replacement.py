"""Curvature for torch's own optimizers, which stay as rules with the same settings."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn

from ..rules import RULES
from .preconditioned import Preconditioned

#: Rule by the name of an optimizer's class, and the settings that the rule takes over.
REPLACEMENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    'SGD': ('SGDM', ('lr', 'momentum', 'weight_decay', 'nesterov')),
    'Adam': ('AdamW', ('lr', 'betas', 'eps')),
    'AdamW': ('AdamW', ('lr', 'betas', 'eps', 'weight_decay')),
    'Adan': ('Adan', ('lr', 'betas', 'eps', 'weight_decay')),
}
#: Settings that choose an implementation and change no result.
IMPLEMENTATION = ('foreach', 'fused')


def rule_for(kind: type[torch.optim.Optimizer], settings: dict[str, Any]) -> dict[str, Any]:
    """Config of the rule that makes the same updates as an optimizer.

    Args:
        kind: SGD, Adam or AdamW of torch, or Adan.
        settings: Its keyword arguments; others have the defaults of its signature.

    Returns:
        ``dict(type=..., lr=..., ...)`` for `build_rule`.

    Raises:
        ValueError: If no rule does what the optimizer does; the message names what to change.
    """
    if kind.__name__ not in REPLACEMENTS or _is_foreign(kind):
        raise ValueError(
            f'{kind.__name__} cannot be a rule under a preconditioner; '
            f'choose one of {", ".join(REPLACEMENTS)}, or a rule of Preconditioned'
        )
    rule, taken = REPLACEMENTS[kind.__name__]
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.default is not parameter.empty
    }
    config: dict[str, Any] = {'type': rule}
    for name, value in {**defaults, **settings}.items():
        if name in taken:
            config[name] = value
        elif name not in IMPLEMENTATION and value != _neutral(name, defaults):
            raise ValueError(
                f'{kind.__name__} with {name}={value!r} has no rule that does the same; '
                f'{_advice(kind, name)}'
            )
    return config


def precondition(
    model: nn.Module, optimizer: torch.optim.Optimizer, layers: Any = 'AFOpt+NKFAC', **options: Any
) -> Preconditioned:
    """Adds curvature to an optimizer of torch.

    Build schedulers for the returned optimizer; the given one is not changed, and no longer needed.

    Args:
        model: The module that owns the parameters.
        optimizer: SGD, Adam or AdamW of torch, new or after some steps; or a new Adan.
        layers: Methods as in `Preconditioned`; default: AFOpt on attention modules and NKFAC
            elsewhere.
        **options: Further options of `Preconditioned`.

    Returns:
        An optimizer with the same groups and moments.

    Raises:
        ValueError: If no rule does what the optimizer does, or `layers` is invalid.
        TypeError: If the arguments are no model and no optimizer.
    """
    if not (isinstance(model, nn.Module) and isinstance(optimizer, torch.optim.Optimizer)):
        raise TypeError(
            f'precondition was given a {type(model).__name__} and a {type(optimizer).__name__}; '
            'give the model, then an optimizer of torch'
        )
    kind = type(optimizer)
    names = inspect.signature(kind).parameters  # `defaults` has entries too that are no arguments

    def rule_of(group: dict[str, Any]) -> dict[str, Any]:
        return rule_for(kind, {key: group[key] for key in optimizer.defaults if key in names})

    rule = rule_of(optimizer.defaults)
    hyper = RULES[rule['type']].hyper
    groups = []
    for group in optimizer.param_groups:
        own = rule_of(group)
        differing = [key for key in own if key not in hyper and own[key] != rule[key]]
        if differing:
            raise ValueError(
                f'the groups of {kind.__name__} differ in {", ".join(differing)}, which must be '
                'the same in all groups'
            )
        kept = {key: value for key, value in group.items() if key not in optimizer.defaults}
        groups.append(kept | {key: value for key, value in own.items() if key in hyper})
    built = Preconditioned(groups, model=model, rule=rule, layers=layers, **options)
    if optimizer.state:
        state = built.state_dict()
        state['state'] = copy.deepcopy(optimizer.state_dict()['state'])
        built.load_state_dict(state)
    if optimizer.state or any('initial_lr' in group for group in optimizer.param_groups):
        # A rate below its first one has decayed: it is no warm-up.
        built.curvature.warm_up.restore(1.0)
    return built


def _is_foreign(kind: type[torch.optim.Optimizer]) -> bool:
    """True for another package's class of a known name, which may update otherwise."""
    if hasattr(torch.optim, kind.__name__):
        return getattr(torch.optim, kind.__name__) is not kind
    betas = inspect.signature(kind).parameters.get(
        'betas'
    )  # of some packages they are weights of the new value
    usual = RULES[REPLACEMENTS[kind.__name__][0]].defaults['betas']
    return betas is None or betas.default != usual


def _neutral(name: str, defaults: dict[str, Any]) -> Any:
    """Value of a setting that leaves it without effect."""
    return 0 if name == 'weight_decay' else defaults.get(name)


def _advice(kind: type, name: str) -> str:
    if kind.__name__ == 'Adam' and name == 'weight_decay':
        return "take type='AdamW', whose decay is decoupled"
    return f'leave {name} out'
