"""SKFAC on single layers and on a network with tall sides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmprecond.optimizers import KFAC, PreconditionedOptimizer
from tests.support.samples import loss_of

EVERY = dict(stat_interval=1, refresh_interval=1)


def entry(optimizer: PreconditionedOptimizer, name: str = 'weight') -> dict[str, Any]:
    return optimizer.state_dict()['precond']['layers'][name]


def factors(optimizer: PreconditionedOptimizer, name: str = 'weight') -> tuple[Tensor, Tensor]:
    """R and L; columns as their products."""
    found = {}
    for key, value in entry(optimizer, name)['statistics'].items():
        found[key.split('_')[0]] = value @ value.mT if 'columns' in key else value.clone()
    return found['input'], found['gradient']


def measure(
    module: nn.Module, *inputs: Tensor, make: Any = KFAC, **settings: Any
) -> PreconditionedOptimizer:
    """One step with learning rate 0 on one call for each input."""
    optimizer = make(module, lr=0.0, **settings)
    sum(loss_of(module(x)) for x in inputs).backward()
    optimizer.step()
    return optimizer


def close(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.expand_as(a), rtol=1e-10, atol=1e-12)


class Tall(nn.Module):
    """Sides of 14 to 31 in groups, a layer that is called twice, and short sides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 28, 3, groups=2, stride=2, padding=1)
        self.narrow = nn.Conv2d(28, 5, 3, bias=False)
        self.lift = nn.Linear(5, 20)
        self.twice = nn.Linear(20, 20)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.narrow(torch.tanh(self.conv(x)))).flatten(2).mT
        x = torch.tanh(self.twice(torch.tanh(self.lift(x))))
        return self.head(torch.tanh(self.twice(x)).mean(1))


def images(step: int, n: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, 4, 9, 7, generator=generator, dtype=torch.float64)
