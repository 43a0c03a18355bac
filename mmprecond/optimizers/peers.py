"""Optimizers of the package pytorch_optimizer, by name: ``type='pytorch_optimizer.SOAP'``.

This module does not implement them again. The settings of a config go unchanged to the classes of
that package. Peers are optimizers of that package.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..checks import did_you_mean
from ..second_order import detach_gradients, fill_missing, mean_over_ranks

PACKAGE = 'pytorch_optimizer'

#: What no signature tells.
_UNFIT_REASONS = {
    'AliG': 'needs a closure in each step',
    'DeMo': 'exchanges gradients between ranks itself',
    'DistributedMuon': 'keeps a state of its own on each rank, of which checkpoints hold one',
}


def is_peer(kind: Any) -> bool:
    """True if a config's `type`, a name or a class, belongs to that package."""
    module = kind if isinstance(kind, str) else getattr(kind, '__module__', None)
    return isinstance(module, str) and '.' in module and module.split('.')[0] == PACKAGE


def find_peer(kind: Any) -> type[torch.optim.Optimizer]:
    """Class that a config's `type` names.

    Args:
        kind: A class, or a name such as 'pytorch_optimizer.SOAP'.

    Raises:
        ImportError: If the package is not installed.
        ValueError: If the name is unknown, or MMEngine's loop cannot step the optimizer.
    """
    if isinstance(kind, str):
        kind = _load_peer(kind)
    reason = _unfit_reason(kind)
    if reason:
        raise ValueError(
            f"{PACKAGE}.{kind.__name__} {reason}, which MMEngine's training loop does "
            'not do; choose another optimizer'
        )
    optimizer_type: type[torch.optim.Optimizer] = kind
    return optimizer_type


def needs_of(kind: type[torch.optim.Optimizer]) -> str:
    """Input that a peer needs in addition to gradients (see `RuleOptimizer.needs`)."""
    return 'graph' if 'hessian' in inspect.signature(kind.step).parameters else ''


def with_groups(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """Returns a function that builds the peer with the parameter groups that it needs.

    Muon and similar optimizers orthogonalise matrices and need them in separate groups. All other
    parameters take AdamW at `adamw_lr` and `adamw_wd`. A group's own ``use_muon`` (by
    `custom_keys`, for instance for embeddings and the last layer) has priority over the shape.
    """
    if kind.__module__.split('.')[:3] != [PACKAGE, 'optimizer', 'muon']:
        return kind
    defaults = {name: p.default for name, p in inspect.signature(kind).parameters.items()}

    def build(params: Iterable[Any], **settings: Any) -> torch.optim.Optimizer:
        chosen = defaults | settings
        groups = [part for group in params for part in _split_group(group, chosen)]
        built: Any = kind(groups, **settings)
        # The peer's own defaults lack lr, and MMEngine's schedulers read it there.
        built.defaults.setdefault('lr', chosen['lr'])
        return built

    return build


class PeerHessian:
    """Adapter between `DoubleBackwardMixin` and a peer whose `step` takes a Hessian.

    The diagonal is the peer's own estimate (`compute_hutchinson_hessian`). The adapter computes it
    before gradients are clipped and their graph is freed, and passes it to the next `step`.

    Args:
        optimizer: AdaHessian, SophiaH or a similar optimizer.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self._hessian: list[Tensor] | None = None
        optimizer.register_step_pre_hook(self._pass_hessian)

    @property
    def needs_graph(self) -> bool:
        """True if this step's backward pass must be differentiable."""
        steps = self.optimizer.param_groups[0].get('step', 0)
        return bool(steps % self.optimizer.update_period == 0)

    def measure(self) -> None:
        """Computes the Hessian from the gradients' graph, frees the graph, averages over ranks."""
        groups = self.optimizer.param_groups
        filled = fill_missing(groups)
        diagonal = self._estimate_diagonal(filled) if self.needs_graph else {}
        mean_over_ranks([*detach_gradients(groups), *diagonal.values()])
        self._hessian = list(diagonal.values()) if diagonal else None

    def _estimate_diagonal(self, filled: set[Tensor]) -> dict[Tensor, Tensor]:
        """Diagonal for each parameter; zeros where the gradient is constant or missing."""
        optimizer = self.optimizer
        everything = [p for group in optimizer.param_groups for p in group['params']]
        curved = dict(
            params=[
                p
                for p in everything
                if p.grad is not None and p.grad.requires_grad and p not in filled
            ]
        )
        optimizer.zero_hessian([curved], optimizer.state)
        optimizer.compute_hutchinson_hessian(
            [curved],
            optimizer.state,
            num_samples=optimizer.num_samples,
            distribution=optimizer.distribution,
        )
        diagonals = {p: optimizer.state[p]['hessian'] for p in curved['params']}
        return {p: diagonals[p] if p in diagonals else torch.zeros_like(p) for p in everything}

    def _pass_hessian(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hessian, self._hessian = self._hessian, None
        return None if hessian is None else (args, {**kwargs, 'hessian': hessian})


def _load_peer(name: str) -> Any:
    try:
        package = importlib.import_module(PACKAGE)
    except ModuleNotFoundError as error:
        if error.name != PACKAGE:
            raise
        raise ImportError(
            f'{name} is of the package {PACKAGE}, which is not installed; run '
            f'`pip install {PACKAGE}`'
        ) from error
    short = name.rsplit('.', 1)[1]
    names = sorted(key for key, kind in vars(package).items() if _is_optimizer(kind))
    if short not in names:
        near = did_you_mean(short, names, 0.5).rstrip()
        raise ValueError(
            f'{PACKAGE} has no optimizer {short!r}; {near or "it has " + ", ".join(names)}'
        )
    return getattr(package, short)


def _is_optimizer(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)


def _unfit_reason(kind: Any) -> str:
    """Reason why neither gradients nor our wrapper are enough for a peer, or ''."""
    arguments = list(inspect.signature(kind).parameters)
    step = inspect.signature(kind.step).parameters
    if 'base_optimizer' in arguments or hasattr(kind, 'first_step'):
        return 'takes two forward and backward passes a step, by a closure'
    if arguments[0] != 'params':
        return f'takes {arguments[0]!r} in the place of parameters'
    if step['closure'].default is inspect.Parameter.empty:
        return 'needs a closure in each step'
    if hasattr(kind, 'train') and hasattr(kind, 'eval'):
        return 'must be told optimizer.train() and optimizer.eval() around each validation'
    if 'attention_max_logits' in step:
        return 'needs the largest attention logits in each step'
    return _UNFIT_REASONS.get(kind.__name__, '')


def _split_group(group: Any, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Splits a parameter or a group into groups of matrices and of other parameters."""
    group = dict(group) if isinstance(group, dict) else dict(params=[group])
    params = group.pop('params')
    params = [params] if isinstance(params, Tensor) else list(params)
    parts: dict[bool, list[Tensor]] = {}
    for p in params:
        parts.setdefault(bool(group.get('use_muon', p.ndim >= 2)), []).append(p)
    groups = []
    for matrices, members in parts.items():
        part = {**group, 'params': members, 'use_muon': matrices}
        for key, own in (('lr', 'adamw_lr'), ('weight_decay', 'adamw_wd')):
            if not matrices and key in part and settings[key]:  # a multiple of the matrices' value
                part[key] *= settings[own] / settings[key]
        groups.append(part)
    return groups
