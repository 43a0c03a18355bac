"""A network whose second layer joins late, and its training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmprecond.optimizers import PreconditionedOptimizer


class Net(nn.Module):
    """Layers of one shape of which the second one is used first, and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, groups=2)
        self.late, self.early = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor, late: bool) -> Tensor:
        x = torch.tanh(self.norm(self.early(self.conv(x).mean((2, 3)))))
        return self.last(self.late(x) if late else x)


def train(model: nn.Module, optimizer: PreconditionedOptimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x, late=step >= 3) ** 2).mean().backward()
        optimizer.step()
