"""Replacement of the optimizer in a config."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import OPTIMIZERS

from .. import optimizers
from ..checks import did_you_mean
from ..core import CurvatureOptions, parse_layers
from ..optimizers import PreconditionedOptimizer
from ..optimizers.catalogue import has_adam_scale
from ..optimizers.peers import PACKAGE, find_peer, is_peer
from ..rules import RULES
from .constructor import PrecondOptimWrapperConstructor
from .registration import optimizer_types
from .resolution import class_name, resolve

#: Settings of a first-order optimizer that another one takes over.
CARRIED = ('lr', 'momentum', 'weight_decay', 'betas', 'eps')

#: Hook that calibrates MAC's first layer, as published.
CALIBRATION = 'CalibrationHook'
#: Hooks of this package that need an optimizer of some class.
OWNERS: dict[str, type] = {'CurvatureHook': PreconditionedOptimizer, CALIBRATION: optimizers.MAC}

#: Torch's own optimizers for comparisons, with the settings that a config would give them.
BASELINES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    'SGD': (torch.optim.SGD, dict(momentum=0.9)),
    'AdamW': (torch.optim.AdamW, {}),
    'Adam': (torch.optim.Adam, {}),
    'Adagrad': (torch.optim.Adagrad, {}),
    'RAdam': (torch.optim.RAdam, dict(decoupled_weight_decay=True)),
}


def use_optimizer(cfg: Config, name: str, attached: bool = False) -> None:
    """Replaces a config's optimizer, but keeps its learning rate, decay and paramwise_cfg.

    MAC and SMAC get their `CalibrationHook`. Settings of all layers beside `constructor` stay if
    the optimizer has such layers. A `paper` entry is removed, because it belongs to another
    optimizer, and so are hooks that the optimizer has no use for.

    Args:
        cfg: A config of MMDetection, MMPretrain or a similar toolbox; changed in place.
        name: Name of an optimizer of this package. For comparisons also torch's 'SGD' (momentum 0.9
            unless the config has another), 'AdamW', 'Adam', 'Adagrad' and 'RAdam' (with decoupled
            decay), or one of another package, such as 'pytorch_optimizer.SOAP'.
        attached: Whether curvature is added to it afterwards (see `attach`).

    Raises:
        ValueError: If the name is unknown, or the config has no optimizer.
        ImportError: If the package is not installed.
    """
    names = [
        kind.__name__
        for kind in optimizer_types()
        if 'lr' in inspect.signature(kind.__init__).parameters
    ]
    if name == 'Preconditioned':
        raise ValueError(
            'Preconditioned needs layers: take --precondition AFOpt+NKFAC, or write them in the '
            'config'
        )
    peer = find_peer(name) if is_peer(name) else None
    if peer is None and name not in [*names, *BASELINES]:
        raise ValueError(
            f'unknown optimizer {name!r}; {did_you_mean(name, [*names, *BASELINES])}choose one of '
            f'{", ".join(names)}, or of torch: {", ".join(BASELINES)}, or {PACKAGE}.NAME of '
            'that package'
        )
    wrapper = _wrapper_of(cfg, 'take lr and weight_decay from')
    kind, new = BASELINES.get(name) or (peer or getattr(optimizers, name), {})
    wrapper.pop('precondition', None)
    options = {} if attached else _take_options(wrapper, kind)
    _fit_hooks(cfg, optimizers.Preconditioned if attached else kind)
    if name in BASELINES and _is_ours(wrapper.get('constructor')):
        wrapper['precondition'] = None  # a baseline stays one
    old = dict(wrapper['optimizer'])
    if name in BASELINES and old['type'] in (name, BASELINES[name][0]):
        return
    rule = old.get('rule')
    if isinstance(rule, dict):  # of `Preconditioned`
        old.update(rule)
    new = {**new, **_carried(old, kind), **options}
    _warn_of_another_scale(name, kind, old, new)
    wrapper['optimizer'] = dict(type=name, **new)
    cfg.pop('paper', None)
    if name not in BASELINES:
        _use_constructor(wrapper)


def _take_options(wrapper: dict[str, Any], kind: type) -> dict[str, Any]:
    """Takes the settings of all layers out of a wrapper, for an optimizer with such layers."""
    options = {key: wrapper.pop(key) for key in CurvatureOptions.names() if key in wrapper}
    if options and not issubclass(kind, PreconditionedOptimizer):
        _warn(f'{kind.__name__} has no {", ".join(options)}: left out of optim_wrapper')
        return {}
    return options


def _fit_hooks(cfg: Config, kind: type) -> None:
    """Removes hooks that an optimizer cannot have, and adds MAC's."""
    hooks = list(cfg.get('custom_hooks') or [])
    names = [_hook_name(hook) for hook in hooks]
    unfit = {name for name, owner in OWNERS.items() if not issubclass(kind, owner)}
    if dropped := unfit.intersection(names):
        _warn(f'{kind.__name__} has no use for {", ".join(sorted(dropped))}: left out')
        hooks = [hook for hook, name in zip(hooks, names, strict=True) if name not in unfit]
    elif issubclass(kind, OWNERS[CALIBRATION]) and CALIBRATION not in names:
        hooks.append(dict(type=CALIBRATION))
    if hooks or cfg.get('custom_hooks'):
        cfg.custom_hooks = hooks


def _hook_name(hook: Any) -> str:
    """Name of the class of a hook in a config; '' for what is no dict."""
    return class_name(hook.get('type')) if isinstance(hook, dict) else ''


def _carried(old: dict[str, Any], kind: type) -> dict[str, Any]:
    """Settings of a config's optimizer that another one takes over."""
    parameters = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    usual = getattr(parameters.get('betas'), 'default', None) or (0.9, 0.999)
    taken = {key: old[key] for key in CARRIED if key in old and key in parameters}
    if len(taken.get('betas', usual)) != len(usual):
        del taken['betas']  # Adan's, which are three
    return taken


def _warn_of_another_scale(name: str, kind: type, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Warns if the rate or the weight decay means another thing for the new optimizer."""
    before = class_name(old['type'])
    was_adaptive = _had_adam_scale(old['type'])
    if was_adaptive not in (None, has_adam_scale(kind)):
        _warn(
            f'{name} keeps lr={old.get("lr")} of {before}, a rule of another kind: its best '
            'learning rate will differ'
        )
    if name in ('Adam', 'Adagrad') and was_adaptive and new.get('weight_decay'):
        _warn(
            f'{name} adds weight_decay={new["weight_decay"]} to the gradient; if {before} has it '
            'outside, the best weight decay will differ'
        )


def _had_adam_scale(kind: Any) -> bool | None:
    """`has_adam_scale` of a config's optimizer or rule; None if the name is unknown."""
    try:
        return has_adam_scale(resolve(OPTIMIZERS, kind))
    except KeyError:
        return RULES[kind].elementwise if kind in RULES else None


def _warn(text: str) -> None:
    print_log(text, logger='current', level=logging.WARNING)


def choose_optimizer(cfg: Config, optimizer: str | None, precondition: str | None) -> None:
    """Applies `--optimizer` and `--precondition` to a config, in place.

    Args:
        cfg: A config of MMDetection, MMPretrain or a similar toolbox.
        optimizer: Name for `use_optimizer`, or None.
        precondition: Methods for `attach`, or None.

    Raises:
        ValueError: If the two exclude each other, or one of them is invalid.
    """
    if optimizer and precondition and optimizer not in BASELINES:
        raise ValueError(f'--precondition adds curvature to SGD or AdamW, not to {optimizer}')
    if optimizer:
        use_optimizer(cfg, optimizer, attached=bool(precondition))
    if precondition:
        attach(cfg, precondition)


def attach(cfg: Config, precondition: Any) -> None:
    """Adds curvature to a config's own optimizer, which stays as the rule.

    Args:
        cfg: A config of MMDetection, MMPretrain or a similar toolbox; changed in place.
        precondition: One of the forms of `layers` in `Preconditioned`, such as 'AFOpt+NKFAC'.

    Raises:
        ValueError: If the config has no optimizer, or the methods are unknown.
    """
    if precondition is not None:
        parse_layers(precondition)
    wrapper = _wrapper_of(cfg, 'add curvature to')
    _use_constructor(wrapper)
    wrapper['precondition'] = precondition
    cfg.pop('paper', None)


def _wrapper_of(cfg: Config, purpose: str) -> Any:
    """The config's `optim_wrapper`, which must have an optimizer."""
    wrapper = cfg.get('optim_wrapper')
    if not wrapper or not isinstance(wrapper.get('optimizer'), dict):
        raise ValueError(
            f'the config has no optim_wrapper.optimizer to {purpose}; '
            'write optim_wrapper=dict(optimizer=dict(...)) in it'
        )
    return wrapper


def _use_constructor(wrapper: dict[str, Any]) -> None:
    """Names our constructor, with a toolbox's own as its base."""
    base = wrapper.pop('constructor', None)
    usual = base is None or class_name(base) == 'DefaultOptimWrapperConstructor'
    if not (usual or _is_ours(base)):
        wrapper['base_constructor'] = base
    wrapper['constructor'] = PrecondOptimWrapperConstructor.__name__


def _is_ours(constructor: Any) -> bool:
    """True if a config's constructor is this package's, by its name or by a dotted path to it."""
    return class_name(constructor) == PrecondOptimWrapperConstructor.__name__
