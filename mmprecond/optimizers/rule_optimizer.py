"""Optimizer step that all optimizers share: curvature, directions, updates."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..checks import argument_names, check_flag, plain_numbers
from ..rules import Group, Rule, State
from .groups import FOREIGN_SETTINGS, refuse_without_effect


class Batch(NamedTuple):
    """Some parameters of a group with equal hyper-parameters, and their states."""

    group: Group
    params: list[Tensor]
    states: list[State]

    def with_gradients(self) -> Batch:
        """The same without parameters that have no gradient."""
        kept = [k for k, p in enumerate(self.params) if p.grad is not None]
        return Batch(self.group, [self.params[k] for k in kept], [self.states[k] for k in kept])


#: Entries of a group that `print` leaves out: the parameters, and notes of schedulers.
HIDDEN = ('params', 'initial_lr', 'initial_momentum', 'initial_damping')


@lru_cache
def _made_by_torch() -> set[str]:
    """Attributes that torch makes anew for a copy, and those that its schedulers hang on it."""
    plain = torch.optim.SGD([torch.zeros(1)], lr=0.0)  # not at import: it loads torch's compiler
    return {'step', '_opt_called', *vars(plain)} - {'defaults', 'state', 'param_groups'}


class RuleOptimizer(torch.optim.Optimizer):
    """Torch optimizer that applies a `Rule`; subclasses choose the rule's directions.

    Args:
        params: Parameters or groups, as in torch.
        rule: The rule.
        defaults: The rule's hyper-parameters; plain numbers.

    Attributes:
        t: Number of optimizer steps taken.
        needs: Input that a training loop must supply in addition to gradients. MMEngine's wrapper
            supplies it. 'capture': `arm` before the forward pass, `disarm` after the backward pass,
            and `loss_scale`. 'graph': differentiable gradients if `needs_graph` is true, then a
            call of `measure`. 'length': `plan_steps`, before the first step. 'loss': the attribute
            `loss`, and `plan_steps`. '': nothing.

    Raises:
        ValueError: If a hyper-parameter is out of range.
    """

    needs: ClassVar[str] = ''
    #: True if `state_dict` has keys that torch's has not.
    adds_to_state: ClassVar[bool] = False
    #: Those of `GROUP_KEYS` that the optimizer reads.
    group_keys: ClassVar[tuple[str, ...]] = ()
    #: Place of the rule's settings that are no arguments of the optimizer.
    place_of_rule: ClassVar[str] = 'take another rule by Preconditioned'
    #: Settings of the source, by which published numbers were made, beside the preconditioner's.
    published: ClassVar[dict[str, Any]] = {}

    def __init__(self, params: Any, rule: Rule, defaults: Group) -> None:
        self.rule = rule
        super().__init__(params, rule.complete(defaults, defaults))
        self.t = 0

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group of parameters, as in torch; a refused one leaves nothing behind.

        Raises:
            ValueError: For complex parameters, hyper-parameters out of range, and entries that
                would be ignored although they are meant for the optimizer.
        """
        super().add_param_group(self.rule.complete(param_group, self.defaults))
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise
        group = self.param_groups[-1]
        for name in self.rule.hyper:
            if isinstance(group[name], Real) and not isinstance(group[name], (bool, int)):
                group[name] = float(group[name])  # of numpy's types too

    def _check_group(self, group: Group) -> None:
        """Raises ValueError for a group that this optimizer cannot take."""
        if any(p.is_complex() for p in group['params']):
            raise ValueError(
                f'{type(self).__name__} takes no complex parameters; give it '
                'torch.view_as_real of them, or leave them to another optimizer'
            )
        if self._has_foreign_betas(group):
            raise ValueError(
                f'a parameter group has betas, which {type(self).__name__} does not take: its rule '
                f'{type(self.rule).__name__} has {", ".join(self.rule.hyper)}'
            )
        if 'precondition' in group:
            check_flag('precondition', group['precondition'])
        own = self.defaults.keys() | {k for k, v in vars(self.rule).items() if group.get(k) is v}
        entries = {key: value for key, value in group.items() if key not in own}
        refuse_without_effect(
            entries, type(self).__name__, self.group_keys, self._common_settings()
        )
        self.rule.check(group)

    def _common_settings(self) -> dict[str, str]:
        """Settings that all groups have in common, with the place where to give them."""
        of_rule = dict.fromkeys(argument_names(type(self.rule)), self.place_of_rule)
        return of_rule | dict.fromkeys(argument_names(type(self)), 'pass it to the optimizer')

    def _has_foreign_betas(self, group: Group) -> bool:
        """True if a group has betas, as of Adam, and the rule has not."""
        return 'betas' in group and 'betas' not in self.rule.hyper

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what others have hung on the object: copies continue as they are."""
        foreign = _made_by_torch()
        return {name: value for name, value in self.__dict__.items() if name not in foreign}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare_next_step()

    @_disable_dynamo  # of a user's compiled step the graph breaks here
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Takes one optimizer step.

        Args:
            closure: Function that evaluates the loss again, as in torch.

        Returns:
            Loss of the closure, or None.
        """
        if self.t == 0:  # torch's initialisation of an optimizer without a state takes a step
            self._refuse_distributed_checkpoints()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self._receive_loss(loss)
        self._update_curvature()
        directions = self._precondition(self._gradients())
        batches = self._batches(directions)
        updates = self._compute_updates(batches, directions)
        self._restore_updates(updates)
        self._apply_updates(batches, updates)
        self.t += 1
        self._prepare_next_step()
        return loss

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients, and what subclasses measured with them."""
        super().zero_grad(set_to_none)
        self._drop_measured()

    @property
    def needs_loss(self) -> bool:
        """True if `loss` must be set before each step."""
        return self.needs == 'loss'

    # Parts of a step that subclasses may override.

    def _receive_loss(self, loss: Any) -> None:
        """Takes the loss that a closure returned."""

    def _update_curvature(self) -> None:
        """Updates statistics and operators for the directions of this step."""

    def _precondition(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Returns the rule's directions, made from the gradients."""
        return gradients

    def _restore_updates(self, updates: dict[Tensor, Tensor]) -> None:
        """Changes the rule's updates, in the dict, before they are applied."""

    def _prepare_next_step(self) -> None:
        """Prepares the next forward pass; called after a step."""

    def _drop_measured(self) -> None:
        """Forgets what was measured with gradients that are cleared."""

    def _gradients(self) -> dict[Tensor, Tensor]:
        gradients = {
            p: p.grad for group in self.param_groups for p in group['params'] if p.grad is not None
        }
        if any(g.is_sparse for g in gradients.values()):
            raise ValueError(
                f'{type(self).__name__} takes no sparse gradients; build the '
                'embedding with sparse=False'
            )
        return gradients

    def _batches(self, directions: dict[Tensor, Tensor]) -> list[Batch]:
        """Groups parameters with equal hyper-parameters, device and dtype."""
        batches: dict[Any, Batch] = {}
        for group in self.param_groups:
            for p in group['params']:
                if p in directions:
                    state = self.state[p]
                    key = (self.rule.key(group, state), p.device, p.dtype)
                    batch = batches.get(key)
                    if batch is None:
                        batch = batches[key] = Batch(group, [], [])
                    batch.params.append(p)
                    batch.states.append(state)
        return list(batches.values())

    def _compute_updates(
        self, batches: list[Batch], directions: dict[Tensor, Tensor]
    ) -> dict[Tensor, Tensor]:
        """Computes the rule's updates by parameter."""
        updates: dict[Tensor, Tensor] = {}
        for group, params, states in batches:
            computed = self.rule.compute_updates(
                params, [directions[p] for p in params], states, group
            )
            updates.update(zip(params, computed, strict=True))
        self.rule.combine(updates)
        return updates

    def _apply_updates(self, batches: list[Batch], updates: dict[Tensor, Tensor]) -> None:
        for group, params, states in batches:
            self.rule.apply_updates(params, [updates[p] for p in params], states, group)

    def __repr__(self) -> str:
        """The optimizer's class, and lines about what it does; equal groups have one."""
        return '\n  '.join([f'{type(self).__name__}:', *self._description()])

    def _description(self) -> list[str]:
        """Lines about the rule and the groups."""
        groups: dict[str, int] = {}
        for group in self.param_groups:
            settings = {key: value for key, value in group.items() if key not in HIDDEN}
            text = ', '.join(f'{key} {value}' for key, value in settings.items())
            groups[text] = groups.get(text, 0) + len(group['params'])
        lines = [f'{number} parameters: {text}' for text, number in groups.items()]
        return [f'rule {type(self.rule).__name__}, {self.t} steps taken', *lines]

    def report(self) -> str:
        """Treatment of the parameters, for the log."""
        count = sum(len(group['params']) for group in self.param_groups)
        return f'{count} parameters take {type(self.rule).__name__}'

    def state_dict(self) -> dict[str, Any]:
        """Torch's state, to which subclasses add keys of their own.

        Raises:
            ValueError: If `torch.distributed.checkpoint` asks, which would drop those keys.
        """
        self._refuse_distributed_checkpoints()
        state = super().state_dict()
        for group in state['param_groups']:  # schedules write numbers of numpy, as users do
            group.update({key: plain_numbers(value) for key, value in group.items()})
        return state

    def _refuse_distributed_checkpoints(self) -> None:
        if self.adds_to_state and _asked_by('torch.distributed.checkpoint.state_dict'):
            raise ValueError(
                f'torch.distributed.checkpoint would drop what {type(self).__name__} keeps beside '
                "torch's state; save and load optimizer.state_dict() itself"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of the same rule; a refused state changes nothing.

        Raises:
            ValueError: If the state belongs to another rule or to incompatible settings.
        """
        self.check_state_dict(state_dict)
        super().load_state_dict(state_dict)
        # Torch casts all state tensors to the parameter's dtype, even integers.
        for p, _, state in self._saved_states(state_dict):
            self.state[p].update(
                {
                    name: state[name].to(p.device, copy=True)
                    for name in self.rule.exact
                    if name in state
                }
            )
            if isinstance(state.get('step'), Tensor):  # as torch's own optimizers count
                self.state[p]['step'] = int(state['step'])

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError for a state that `load_state_dict` refuses."""
        self._refuse_distributed_checkpoints()
        if not {'param_groups', 'state'} <= state_dict.keys():
            raise ValueError(
                f'the state has {", ".join(map(str, state_dict)) or "nothing"} in place of state '
                'and param_groups: it is no state of an optimizer of torch; start afresh from the '
                'weights alone (load_from without resume)'
            )
        for group in state_dict['param_groups']:
            self._check_saved(group)
        own_sizes, saved_sizes = (
            [len(group['params']) for group in groups]
            for groups in (self.param_groups, state_dict['param_groups'])
        )
        if own_sizes != saved_sizes:
            raise ValueError(
                f'the state has parameter groups of {saved_sizes} parameters, the optimizer '
                f'of {own_sizes}: it was saved for another model or other groups'
            )
        for p, group, state in self._saved_states(state_dict):
            foreign = [
                key for key, value in state.items() if isinstance(value, (dict, list, tuple))
            ]
            if foreign:  # SOAP, Shampoo: their moments may be in another basis
                raise ValueError(
                    f'the state has {", ".join(map(str, foreign))}, which no optimizer of '
                    'mmprecond has; start afresh from the weights alone (load_from without resume)'
                )
            self.rule.check_state(p, state, group)

    def _saved_states(self, state_dict: dict[str, Any]) -> list[tuple[Tensor, Group, State]]:
        """Parameters with a saved state that is not empty, each with its saved group and state."""
        own_groups = [group['params'] for group in self.param_groups]
        saved_groups = [(group, group['params']) for group in state_dict['param_groups']]
        return [
            (p, group, state_dict['state'][key])
            for params, (group, keys) in zip(own_groups, saved_groups, strict=True)
            for p, key in zip(params, keys, strict=True)
            if state_dict['state'].get(key)
        ]

    def _check_saved(self, group: dict[str, Any]) -> None:
        """Raises ValueError if a saved group belongs to another rule."""
        name = type(self.rule).__name__
        missing = [key for key in self.rule.hyper if key not in group]
        if missing or self._has_foreign_betas(group):
            reason = (
                f'no {", ".join(missing)}, which {name} needs'
                if missing
                else f'betas, which {name} has not'
            )
            raise ValueError(
                f'the state was saved under another rule: its groups have {reason}; start afresh '
                'from the weights alone (load_from without resume)'
            )
        own = FOREIGN_SETTINGS | {'nesterov': getattr(self.rule, 'nesterov', False)}
        for key, value in own.items():
            if group.get(key, value) != value:
                raise ValueError(
                    f'the state was saved with {key}={group[key]}, and {type(self).__name__} has '
                    f'{key}={value}; start afresh from the weights alone (load_from without resume)'
                )
        try:
            self.rule.check(group)
        except ValueError as error:
            raise ValueError(
                f'the state was saved under another rule than {name}: {error}'
            ) from error


def split_module(params: Any, model: nn.Module | None) -> tuple[nn.Module | None, Any]:
    """The model and its parameters or groups; the first argument may be the module itself.

    Raises:
        TypeError: If the model is no module.
    """
    if not (model is None or isinstance(model, nn.Module)):
        raise TypeError(f'model is a {type(model).__name__}; give the nn.Module that is trained')
    if isinstance(params, nn.Module):
        return params, params.parameters()
    return model, params


def _asked_by(module: str) -> bool:
    """True if one of the next callers is a function of this module."""
    frame = inspect.currentframe()
    for _ in range(12):
        frame = frame and frame.f_back
        if frame and frame.f_globals.get('__name__') == module:
            return True
    return False
