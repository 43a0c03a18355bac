"""Every optimizer of the package on one network, with nothing drawn at random."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmprecond import optimizers
from mmprecond.optimizers import PreconditionedOptimizer, RuleOptimizer

#: Every optimizer of the package, with the settings under which nothing is drawn at random.
SETTINGS: dict[str, dict[str, Any]] = {
    'AFOpt': {},
    'ARO': {},
    'AdaAFOpt': {},
    'AdaAct': {},
    'AdaFisher': {},
    'AdaFisherW': {},
    'AdaNKFAC': {},
    # The first batches span few directions; the basis of all others depends on rounding.
    'AdamR': dict(early_refreshes=False),
    'AdamWBK': {},
    'DCTAdamW': dict(rank=4),
    'FAdam': {},
    'FSGD': {},
    'KFAC': {},
    'MAC': {},
    'NKFAC': {},
    'NysAct': dict(rank=4),
    'RAMDA': {},
    'SGDMBK': {},
    'SGDPH': dict(refresh='all'),
    'SMAC': {},
    'SKFAC': dict(reduction='reduce', max_columns=12),
    'SOAA': dict(total_steps=20),
    # One gradient spans few directions of the longer side; so does the first basis.
    'SOAP': dict(max_dim=7, oversize='one_sided'),
    'Shampoo': {},
    'Preconditioned': dict(
        rule=dict(type='Adan', lr=1e-2),
        layers=[
            dict(
                match=dict(module_type='Linear'),
                preconditioner=dict(type='InputFeature', stat_interval=2, refresh_interval=4),
            ),
            dict(preconditioner=dict(type='NewtonKronecker', stat_interval=2, refresh_interval=4)),
        ],
    ),
}
#: Those that stand for all where time is short.
QUICK = ('NKFAC', 'AdamR', 'AFOpt', 'SGDPH')


def mostly_slow(names: Iterable[str]) -> list[Any]:
    """The names as parameters; all but a few are marked as slow."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


MEASURED = [
    name for name in SETTINGS if issubclass(getattr(optimizers, name), PreconditionedOptimizer)
]
#: Those whose statistics come from hooks.
HOOKED = [name for name in MEASURED if name not in ('SOAP', 'Shampoo')]


class Net(nn.Module):
    """Convolutions, one of them called twice, tokens and a head; no batch statistics.

    No unit is ever dead: with an eigenvalue of zero twice, bases are as rounding has it.
    """

    def __init__(self, checkpointed: bool | None = None, inplace: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.twice = nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False)
        self.fc1 = nn.Linear(6, 12)
        self.fc2 = nn.Linear(12, 4)
        self.checkpointed = checkpointed
        self.inplace = inplace

    def middle(self, x: Tensor) -> Tensor:
        x = F.elu(self.twice(x), inplace=self.inplace)
        return torch.tanh(self.twice(F.avg_pool2d(x, 2)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.norm(self.stem(x)), inplace=self.inplace)
        if self.checkpointed is None:
            x = self.middle(x)
        else:
            x = checkpoint(self.middle, x, use_reentrant=self.checkpointed)
        tokens = x.flatten(2).mT
        return self.fc2(F.elu(self.fc1(tokens), inplace=self.inplace).mean(1))


def make(name: str, model: nn.Module, **settings: Any) -> RuleOptimizer:
    if name != 'Preconditioned':
        settings = dict(lr=1e-2) | settings
    if name in MEASURED and name != 'Preconditioned':
        settings = dict(stat_interval=2, refresh_interval=4) | settings
    return getattr(optimizers, name)(model, **SETTINGS[name] | settings)


def backward(name: str, optimizer: Any, loss: Tensor) -> None:
    if optimizer.needs == 'loss':  # the shares of micro-batches
        optimizer.loss = loss.detach() + (0 if optimizer.loss is None else optimizer.loss)
    if optimizer.needs == 'graph' and optimizer.needs_graph:
        loss.backward(create_graph=True)
    else:
        loss.backward()


def images(seed: int, count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64),
        torch.randint(0, 4, (count,), generator=generator),
    )


def train(
    name: str,
    model: nn.Module,
    optimizer: RuleOptimizer,
    steps: range,
    sizes: tuple[int, ...] = (6,),
) -> None:
    """Steps on batches of six, in micro-batches of the given sizes."""
    for seed in steps:
        optimizer.zero_grad()
        x, y = images(seed)
        for xs, ys in zip(x.split(sizes), y.split(sizes), strict=True):
            loss = F.cross_entropy(model(xs), ys, reduction='sum') / 6
            backward(name, optimizer, loss)
        optimizer.step()


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options).double()
