"""Whole trajectories of an optimizer beside those of a reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmprecond.optimizers import PreconditionedOptimizer
from tests.reference.factors import Loss
from tests.reference.nkfac import ReferenceNKFAC

SGD = dict(lr=0.05, momentum=0.9, weight_decay=0.01)
ADAM = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.02)


def batch(step: int, n: int = 3, features: int = 0) -> Tensor:
    """Inputs of a step: images, or rows of features."""
    shape = (n, features) if features else (n, 2, 5, 6)
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(shape, generator=generator).double()


class Convs(nn.Module):
    """Grouped, depthwise and dilated convolutions, one head for three levels, a norm layer."""

    features = 0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(2, 4, (2, 3), padding='same', padding_mode='reflect', bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4, padding=1)
        self.grouped = nn.Conv2d(4, 6, 2, groups=2, stride=2, dilation=2, padding=1)
        self.head = nn.Conv2d(6, 3, 1)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        x = self.grouped(F.relu(self.depthwise(x), inplace=True))
        levels = [self.head(x), self.head(F.avg_pool2d(x, 2)), self.head(x.mean((2, 3), True))]
        return sum(level.mean((2, 3)) * self.scale for level in levels)


class Tokens(nn.Module):
    """Linear layers, equal and unequal in shape; some share weights or are used now and then."""

    features = 6

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))
        self.tied = nn.Linear(6, 6)
        self.tied.weight, self.tied.bias = self.first.weight, self.first.bias
        self.last = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor, use_second: bool = True) -> Tensor:
        x = x + torch.tanh(self.third(torch.tanh(self.first(x))))
        x = torch.tanh(self.second(x)) if use_second else x
        return self.last(torch.tanh(self.tied(x)))


def make_loss(x: Tensor, divisor: float = 1.0, **kwargs: Any) -> Loss:
    """A squared error: no factor has the ones in its null space."""
    target = torch.arange(3, dtype=x.dtype) - 1.5
    return lambda model: ((model(x, **kwargs) - target) ** 2).mean() / divisor


def follow(
    model: nn.Module,
    optimizer: PreconditionedOptimizer,
    reference: ReferenceNKFAC,
    losses: Callable[[int], list[Loss]],
    steps: int,
    atol: float = 1e-9,
) -> None:
    """Trains both and compares all parameters after every step."""
    for step in range(steps):
        optimizer.zero_grad()
        for loss in losses(step):
            loss(model).backward()
        optimizer.step()
        reference.step(*losses(step))
        theirs = dict(reference.model.named_parameters())
        for name, p in model.named_parameters():
            assert torch.allclose(p, theirs[name], rtol=0, atol=atol), (name, step)
