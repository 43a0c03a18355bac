"""Replacement of the optimizer in a config."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log

from .. import optimizers
from ..checks import did_you_mean
from ..core import parse_layers
from ..optimizers.peers import PACKAGE, find_peer, is_peer
from .constructor import PrecondOptimWrapperConstructor
from .registration import optimizer_types

#: Settings of a first-order optimizer that another one takes over.
CARRIED = ('lr', 'momentum', 'weight_decay', 'betas', 'eps')

#: Hook that calibrates MAC's first layer, as published.
CALIBRATION = 'CalibrationHook'

#: Torch's own optimizers for comparisons, with the settings that a config would give them.
BASELINES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    'SGD': (torch.optim.SGD, dict(momentum=0.9)),
    'AdamW': (torch.optim.AdamW, {}),
    'Adam': (torch.optim.Adam, {}),
    'Adagrad': (torch.optim.Adagrad, {}),
    'RAdam': (torch.optim.RAdam, dict(decoupled_weight_decay=True)),
}


def use_optimizer(cfg: Config, name: str) -> None:
    """Replaces a config's optimizer, but keeps its learning rate, decay and paramwise_cfg.

    MAC and SMAC get their `CalibrationHook`. A `paper` entry is removed, because it belongs to
    another optimizer.

    Args:
        cfg: A config of MMDetection, MMPretrain or a similar toolbox; changed in place.
        name: Name of an optimizer of this package. For comparisons also torch's 'SGD' (momentum 0.9
            unless the config has another), 'AdamW', 'Adam', 'Adagrad' and 'RAdam' (with decoupled
            decay), or one of another package, such as 'pytorch_optimizer.SOAP'.

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
    wrapper.pop('precondition', None)
    if name in BASELINES and _is_ours(wrapper.get('constructor')):
        wrapper['precondition'] = None  # a baseline stays one
    old = dict(wrapper['optimizer'])
    if name in BASELINES and old['type'] == name:
        return
    rule = old.get('rule')
    if isinstance(rule, dict):  # of `Preconditioned`
        old.update(rule)
    kind, new = BASELINES.get(name) or (peer or getattr(optimizers, name), {})
    parameters = inspect.signature(kind.__init__).parameters
    usual = getattr(parameters.get('betas'), 'default', None) or (0.9, 0.999)
    if len(old.get('betas', usual)) != len(usual):
        del old['betas']  # Adan's, which are three
    new = new | {key: old[key] for key in CARRIED if key in old and key in parameters}
    adaptive = 'betas' in parameters or name == 'Adagrad'
    was_adaptive = str(old['type']).startswith('Ada') or 'Adam' in str(old['type'])
    if adaptive != was_adaptive and ('momentum' in old or was_adaptive):
        print_log(
            f'{name} keeps lr={old.get("lr")} of {old["type"]}, a rule of another kind: its '
            'best learning rate will differ',
            logger='current',
            level=30,
        )
    if name in ('Adam', 'Adagrad') and was_adaptive and new.get('weight_decay'):
        print_log(
            f'{name} adds weight_decay={new["weight_decay"]} to the gradient; if {old["type"]} has '
            'it outside, the best weight decay will differ',
            logger='current',
            level=30,
        )
    wrapper['optimizer'] = dict(type=name, **new)
    cfg.pop('paper', None)
    if name in BASELINES:
        return
    _use_constructor(wrapper)
    hooks = cfg.get('custom_hooks') or []
    if name in ('MAC', 'SMAC') and CALIBRATION not in [hook['type'] for hook in hooks]:
        cfg.custom_hooks = [*hooks, dict(type=CALIBRATION)]


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
        use_optimizer(cfg, optimizer)
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
    if base not in (None, 'DefaultOptimWrapperConstructor') and not _is_ours(base):
        wrapper['base_constructor'] = base
    wrapper['constructor'] = PrecondOptimWrapperConstructor.__name__


def _is_ours(constructor: Any) -> bool:
    """True if a config's constructor is this package's, by its name or by a dotted path to it."""
    return str(constructor).split('.')[-1] == PrecondOptimWrapperConstructor.__name__
