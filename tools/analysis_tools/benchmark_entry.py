"""Optimizer that benchmark.py times, with its copy of the model and its kinds of steps."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import mmprecond.optimizers as optimizers
from common.timing import now
from mmprecond.checks import did_you_mean
from mmprecond.core import split_words
from mmprecond.optimizers import PreconditionedOptimizer, RuleOptimizer
from mmprecond.optimizers.peers import PACKAGE, with_groups

#: Steps between captures and between refreshes while the clock runs.
CAPTURE, REFRESH = 2, 4
KINDS = ('plain', 'statistics', 'refresh')
#: Ours that measure at every step.
EVERY_STEP = ('AdaAct', 'SOAP', 'Shampoo')
PEERS = tuple(f'{PACKAGE}.{name}' for name in ('SOAP', 'Shampoo', 'Muon'))
#: Settings that tell the steps of all methods apart.
INTERVALS = dict(stat_interval=CAPTURE, refresh_interval=REFRESH, early_refreshes=False)


@dataclass
class Entry:
    """One optimizer with its copy of the model.

    Attributes:
        name: Name in the user's notation.
        model: Copy of the model.
        optimizer: The optimizer.
        seconds: Times of whole iterations by kind of step.
        steps: Times of `optimizer.step()` alone.
        peak_mb: Peak memory.
    """

    name: str
    model: Any
    optimizer: Any
    seconds: dict[str, list[float]] = field(default_factory=lambda: {k: [] for k in KINDS})
    steps: dict[str, list[float]] = field(default_factory=lambda: {k: [] for k in KINDS})
    peak_mb: float = 0.0

    @property
    def base(self) -> str:
        """First-order optimizer of the comparison."""
        return 'AdamW' if 'betas' in self.optimizer.defaults else 'SGD'

    def kind(self, step: int) -> str:
        """Kind of a step: plain, with a capture, or with a refresh."""
        if not isinstance(self.optimizer, PreconditionedOptimizer):
            return 'plain'
        methods = {stack.method for stack in self.optimizer.curvature.stacks}
        # Methods with other intervals measure at every step.
        counts = [step + method.count_from for method in methods if method.stat_interval == CAPTURE]
        if all(count % CAPTURE for count in counts):
            return 'plain'
        return 'statistics' if all(count % REFRESH for count in counts) else 'refresh'

    def train_watched(self, batch: dict[str, Any]) -> tuple[float, float]:
        """Runs one iteration; on a GPU `peak_mb` is what one takes beside what is held."""
        device, before = batch['inputs'].device, 0
        if device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        times = self.train(batch)
        if device.type == 'cuda':
            peak = (torch.cuda.max_memory_allocated(device) - before) / 2**20
            self.peak_mb = max(self.peak_mb, peak)
        return times

    def train(self, batch: dict[str, Any]) -> tuple[float, float]:
        """Runs one iteration; returns its seconds, and those of the optimizer's step."""
        start = now(batch['inputs'])
        loss = self.model.parse_losses(self.model(**batch))[0]
        self.optimizer.zero_grad()
        loss.backward()
        if getattr(self.optimizer, 'needs', '') == 'loss':
            self.optimizer.loss = loss.detach()
        middle = now(batch['inputs'])
        self.optimizer.step()
        end = now(batch['inputs'])
        return end - start, end - middle

    def state_mb(self) -> float:
        """Memory of moments, statistics and operators."""
        tensors = [t for state in self.optimizer.state.values() for t in flatten_state(state)]
        curvature = getattr(self.optimizer, 'curvature', None)
        for stack in curvature.stacks if curvature else []:
            tensors += [*stack.statistics.values(), *stack.operator_tensors.values()]
        return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def amortised(seconds: Mapping[str, float], capture: int, refresh: int) -> float:
    """Seconds of an average iteration at some intervals, from those of each kind of step."""
    plain = seconds['plain']
    measured = seconds.get('statistics', plain)
    refreshed = seconds.get('refresh', measured)
    return plain + (measured - plain) / capture + (refreshed - measured) / refresh


def flatten_state(state: Any) -> list[torch.Tensor]:
    """The tensors in a nested state."""
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state
    return (
        [t for v in values for t in flatten_state(v)]
        if isinstance(state, (dict, list, tuple))
        else []
    )


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Parses a name and its settings from NAME:key=value:key=value."""
    name, *settings = spec.split(':')
    options: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition('=')
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return name, options


def build_optimizer(spec: str, model: nn.Module) -> torch.optim.Optimizer:
    """Builds an optimizer of torch, ours or pytorch_optimizer, at a rate that changes little.

    A name such as AFOpt+NKFAC stands for these methods under AdamW.
    """
    name, options = parse_spec(spec)
    if name in ('SGD', 'AdamW'):
        extra = dict(momentum=0.9) if name == 'SGD' else {}
        return getattr(torch.optim, name)(model.parameters(), lr=1e-5, **extra, **options)
    if '+' in name:
        layers = {part: dict(type=word, **INTERVALS) for part, word in split_words(name).items()}
        rule = dict(type='AdamW', lr=1e-5)
        return optimizers.Preconditioned(model, rule=rule, layers=layers, **options)
    if name in timed():
        taken = sorted(
            {'stat_interval', 'refresh_interval', 'early_refreshes', 'stagger'} & set(options)
        )
        if taken:
            raise ValueError(
                f'{spec}: this tool sets the intervals, to tell steps apart by what '
                f'they do; leave out {", ".join(taken)} and see --intervals'
            )
        kind = getattr(optimizers, name)
        if kind.needs == 'capture' and name not in EVERY_STEP:
            options = dict(**INTERVALS, **options)
        elif kind.needs == 'loss':
            options = dict(total_steps=10**6, **options)
        return kind(model, lr=1e-5, **options)
    peers = installed_peers()
    if name in peers:
        return peers[name]([dict(params=list(model.parameters()))], lr=1e-5, **options)
    choices = ['SGD', 'AdamW', 'AFOpt+NKFAC', *timed(), *PEERS]
    raise ValueError(
        f'cannot time {name!r} here; {did_you_mean(name, choices)}choose from '
        f'{", ".join(choices)} (the last '
        f'{len(PEERS)} from the package pytorch_optimizer, if it is installed)'
    )


def timed() -> list[str]:
    """Names of our optimizers that need only a learning rate and no second derivatives."""
    kinds = {name: getattr(optimizers, name) for name in optimizers.__all__}
    return [
        name
        for name, kind in kinds.items()
        if isinstance(kind, type)
        and issubclass(kind, RuleOptimizer)
        and kind.needs != 'graph'
        and 'lr' in inspect.signature(kind.__init__).parameters
    ]


def installed_peers() -> dict[str, Any]:
    """Preconditioned optimizers of the optional package pytorch_optimizer."""
    try:
        import pytorch_optimizer
    except ImportError:
        return {}
    kinds = {name: getattr(pytorch_optimizer, name.split('.')[1], None) for name in PEERS}
    return {name: with_groups(kind) for name, kind in kinds.items() if kind is not None}
