"""Networks with sides over max_dim."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmprecond.optimizers import PreconditionedOptimizer

FORMS = ['block', 'lowrank']
EVERY = dict(stat_interval=1, refresh_interval=1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def chain(*sizes: int, bias: bool = True) -> nn.Module:
    """Linear layers with tanh between them."""
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.Linear(i, o, bias=bias), nn.Tanh())
        for i, o in zip(sizes, sizes[1:], strict=False)
    ]
    layers[-1] = layers[-1][0]
    return nn.Sequential(*layers)


def one_step(model: nn.Module, optimizer: PreconditionedOptimizer, x: Tensor) -> list[Tensor]:
    """How far one step moves the parameters."""
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    (torch.tanh(model(x)) ** 2).mean().backward()
    optimizer.step()
    return [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
