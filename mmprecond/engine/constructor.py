"""Optimizer wrapper constructor that passes the model to the optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import MMLogger, print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

from ..checks import did_you_mean
from ..core import CurvatureOptions
from ..curvature import unwrap
from ..distributed import rank
from ..optimizers import Preconditioned, PreconditionedOptimizer, RuleOptimizer
from ..optimizers.groups import GROUP_KEYS
from ..optimizers.peers import find_peer, is_peer, needs_of, with_groups
from ..optimizers.preconditioned import read_settings
from ..optimizers.replacement import rule_for
from ..rules import build_rule
from ..second_order import refuse_single_backward
from .base_constructor import find_base
from .resolution import resolve
from .surgery import with_surgery
from .wrapper import mixed_wrapper, refuse_sharding

#: Default of `precondition`.
DEFAULT = 'AFOpt+NKFAC'


class PrecondOptimWrapperConstructor:
    """Builds a preconditioned optimizer and its wrapper from a config.

    The config's own SGD, AdamW, Adan, or Adam without decay stays, with all its settings, as the
    rule of a `Preconditioned` optimizer. Attention modules get AFOpt and all other layers NKFAC,
    unless `precondition` says otherwise::

        optim_wrapper = dict(constructor='PrecondOptimWrapperConstructor', precondition='NKFAC')

    Optimizers of this package and of the package pytorch_optimizer are built unchanged. The latter
    are given as ``type='pytorch_optimizer.NAME'``; those that need second derivatives get them.

    A base constructor makes the parameter groups, so `paramwise_cfg` has its usual meaning. Further
    entries of `custom_keys` reach the optimizer (``precondition=False``, ``damping=0.1``,
    ``input_positions=49``).

    Args:
        optim_wrapper_cfg: The config. Its `precondition` is one of the forms of `layers` in
            `Preconditioned`: 'NKFAC', 'AFOpt+NKFAC' (attention and elsewhere; the default), a dict
            or a list. With None the base constructor does all the work. Further options of
            `Preconditioned` (``overhead=0.05``) stand beside it. Its `surgery` combines the
            gradients of the model's losses ('PCGrad', 'GCond', 'SAMGS'; see `SurgeryMixin`). Its
            `base_constructor` names the base constructor (default: the one that reads all keys of
            `paramwise_cfg`).
        paramwise_cfg: Settings of parameter groups, as in MMEngine.

    Raises:
        ValueError: If no rule can replace the optimizer, `precondition` or an option stands beside
            an optimizer of this package, `precondition` is misspelt, the base constructor is
            unclear, or a key of `custom_keys` with a setting of ours fits no parameter.
        KeyError: If a type is not registered.
    """

    def __init__(
        self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None
    ) -> None:
        cfg = optim_wrapper_cfg.copy()
        base = cfg.pop('base_constructor', None)
        self._check_groups: Callable[[list[dict[str, Any]]], None] = lambda groups: None
        names = ['precondition', *CurvatureOptions.names()]
        for key in cfg:
            if key not in names and (near := did_you_mean(key, names, 0.8)):
                raise ValueError(f'optim_wrapper has {key}; {near.rstrip()}')
        given, optimizer = 'precondition' in cfg, cfg.get('optimizer')
        precondition = cfg.pop('precondition', DEFAULT)
        options = {key: cfg.pop(key) for key in CurvatureOptions.names() if key in cfg}
        if precondition is not None and (given or not _does_without(optimizer)):
            self._check_groups, cfg['optimizer'] = _attach(optimizer, precondition, options)
        elif options:
            raise ValueError(
                f'optim_wrapper has {", ".join(options)}, which goes with precondition; an '
                'optimizer of mmprecond takes it among its own settings'
            )
        if base is None:
            base = find_base(paramwise_cfg, strict=precondition is not None)
        hoisted = _defaults_for_base(cfg.get('optimizer'))
        if isinstance(cfg.get('optimizer'), dict):  # a copy of its kind, which is completed below
            cfg['optimizer'] = cfg['optimizer'].copy()
            cfg['optimizer'].update(hoisted)
        self._type = (cfg.get('optimizer') or {}).get('type')
        self._hoisted = list(hoisted)
        self.base = OPTIM_WRAPPER_CONSTRUCTORS.build(
            dict(type=base, optim_wrapper_cfg=cfg, paramwise_cfg=paramwise_cfg)
        )

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Builds the wrapper for a model, which may be wrapped for data parallelism."""
        kind = self._type
        if is_peer(kind):
            return self._build_peer(find_peer(kind), model)
        kind = resolve(OPTIMIZERS, kind)
        if not (inspect.isclass(kind) and issubclass(kind, RuleOptimizer)):
            return self._build(model)
        self._check_custom_keys(model)
        self._mix_wrapper(kind.needs, kind.__name__)
        if 'model' in inspect.signature(kind.__init__).parameters:
            self.base.optimizer_cfg['model'] = unwrap(model)
        if self._hoisted:
            self.base.optimizer_cfg['type'] = partial(self._build_without_hoisted, kind)
        built = self._build(model)
        self._check_groups(built.optimizer.param_groups)
        print_log(built.optimizer.report(), logger='current')
        _write_table(built.optimizer)
        return built

    def _check_custom_keys(self, model: nn.Module) -> None:
        """Raises ValueError if a key with a setting of this package is in no parameter's name."""
        names = [name for name, _ in unwrap(model).named_parameters()]
        keys = (self.base.paramwise_cfg or {}).get('custom_keys') or {}
        for key, settings in keys.items():
            if set(settings) & set(GROUP_KEYS) and not any(key in name for name in names):
                parts = {
                    '.'.join(n.split('.')[:k]) for n in names for k in range(1, 1 + n.count('.'))
                }
                raise ValueError(
                    f'custom_keys has {key!r}, which is in the name of no parameter; '
                    f'{did_you_mean(key, parts)}'.rstrip('; ')
                )

    def check_settings(self) -> None:
        """Raises the errors of the optimizer's settings that can be found without the model."""
        kind = None if is_peer(self._type) else resolve(OPTIMIZERS, self._type)
        if not (inspect.isclass(kind) and issubclass(kind, RuleOptimizer)):
            return
        given = {key: v for key, v in self.base.optimizer_cfg.items() if key not in self._hoisted}
        settings = {key: value for key, value in given.items() if key not in ('type', '_scope_')}
        if issubclass(kind, Preconditioned):
            read_settings(settings.pop('rule', None), settings.pop('layers', None), settings)
            return
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2))
        if 'model' in inspect.signature(kind.__init__).parameters:
            settings['model'] = model
        kind(model.parameters(), **settings)

    def _build_without_hoisted(
        self, kind: type[RuleOptimizer], params: Any, **settings: Any
    ) -> RuleOptimizer:
        """The optimizer without the entries that only the base constructor reads."""
        own = {key: value for key, value in settings.items() if key not in self._hoisted}
        return kind(params, **own)  # type: ignore[call-arg]

    def _build_peer(self, kind: type[torch.optim.Optimizer], model: nn.Module) -> OptimWrapper:
        needs = needs_of(kind)
        if needs:
            refuse_single_backward(unwrap(model), kind.__name__)
            self._mix_wrapper(needs, kind.__name__)
        self.base.optimizer_cfg['type'] = with_groups(kind)
        return self._build(model)

    def _build(self, model: nn.Module) -> OptimWrapper:
        """Builds the wrapper by the base constructor, with a surgery if the config has one."""
        cfg = self.base.optim_wrapper_cfg
        if cfg.get('surgery') is None:
            cfg.pop('surgery', None)
        else:
            wrapper = resolve(OPTIM_WRAPPERS, cfg.get('type', 'OptimWrapper'))
            refuse_sharding(cfg, wrapper)
            cfg['type'] = with_surgery(wrapper)
        return self.base(model)

    def _mix_wrapper(self, needs: str, owner: str) -> None:
        """Replaces the wrapper's type by one that gives the optimizer what it needs."""
        cfg = self.base.optim_wrapper_cfg
        wrapper = resolve(OPTIM_WRAPPERS, cfg.get('type', 'OptimWrapper'))
        refuse_sharding(cfg, wrapper)
        cfg['type'] = mixed_wrapper(wrapper, needs, owner)


def _write_table(optimizer: torch.optim.Optimizer) -> None:
    """Writes the table of all modules beside the log, if there is a log file."""
    log = getattr(MMLogger.get_current_instance(), 'log_file', None)
    if isinstance(optimizer, PreconditionedOptimizer) and log and rank() == 0:
        file = Path(log).with_name('layers.txt')
        with file.open('a') as written:  # of several optimizers of a run
            written.write(optimizer.table() + '\n')
        print_log(f'every module: {file}', logger='current')


def _does_without(optimizer: Any) -> bool:
    """True for an optimizer of this package or of pytorch_optimizer."""
    name = (optimizer or {}).get('type')
    if name is None:
        return False
    if is_peer(name):
        return True
    kind = resolve(OPTIMIZERS, name)
    return inspect.isclass(kind) and issubclass(kind, RuleOptimizer)


def _attach(
    optimizer: Any, precondition: Any, options: dict[str, Any]
) -> tuple[Callable[[list[dict[str, Any]]], None], dict[str, Any]]:
    """Config of `Preconditioned` with an optimizer of torch or Adan as its rule.

    Returns:
        A function that raises ValueError if a group has a setting that the rule has not, and the
        config.
    """
    settings = dict(optimizer or {})
    name = settings.pop('type', None)
    settings.pop('_scope_', None)  # of a toolbox's config, whose scope is the run's
    if name is None:
        raise ValueError(
            'optim_wrapper has no optimizer to precondition; write '
            "optimizer=dict(type='SGD', lr=...) in it"
        )
    if is_peer(name):
        raise ValueError(f'{name} cannot be a rule under a preconditioner; leave precondition out')
    kind = resolve(OPTIMIZERS, name)
    if inspect.isclass(kind) and issubclass(kind, RuleOptimizer):
        raise ValueError(
            f'{kind.__name__} is an optimizer of mmprecond already; leave precondition out, or '
            "take type='SGD' or 'AdamW' as its rule"
        )

    def rule_of(settings: dict[str, Any]) -> dict[str, Any]:
        try:
            return rule_for(kind, settings)
        except ValueError as error:
            raise ValueError(f'{error}, or write precondition=None') from error

    def check_groups(groups: list[dict[str, Any]]) -> None:
        known = set(inspect.signature(kind).parameters) - {'params'}
        for group in groups:
            given = {key: value for key, value in group.items() if key in known}
            rule_of({**settings, **given})  # raises its errors

    rule = rule_of(settings)
    return check_groups, type(optimizer)(
        type='Preconditioned', rule=rule, layers=precondition, **options
    )


def _defaults_for_base(optimizer: Any) -> dict[str, Any]:
    """Learning rate and weight decay that a config does not give beside the optimizer's type.

    Base constructors look for them there, to scale them: those in the rule of a `Preconditioned`
    config, and the decay that another optimizer of this package has by default.
    """
    name = (optimizer or {}).get('type') if isinstance(optimizer, dict) else None
    kind = None if name is None or is_peer(name) else resolve(OPTIMIZERS, name)
    if not (inspect.isclass(kind) and issubclass(kind, RuleOptimizer)):
        return {}
    if issubclass(kind, Preconditioned):
        _, defaults = build_rule(optimizer.get('rule'))
        return {key: defaults[key] for key in ('lr', 'weight_decay') if key not in optimizer}
    parameter = inspect.signature(kind.__init__).parameters.get('weight_decay')
    if parameter is None or 'weight_decay' in optimizer:
        return {}
    return {'weight_decay': parameter.default}
