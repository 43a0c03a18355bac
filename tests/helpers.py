"""Networks and small helpers that several tests use."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmprecond import curvature
from mmprecond.curvature import (
    GRADIENT,
    INPUT,
    WEIGHT,
    Columns,
    Factor,
    Mean,
    Moment,
    Side,
    Square,
    Statistic,
)


class ConvNet(nn.Module):
    """The convolutional network of the golden trajectories."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


class TokenNet(nn.Module):
    """The token network of the golden trajectories."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 24)
        self.fc2 = nn.Linear(24, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc2(F.gelu(self.fc1(x)))
        return self.head(self.norm(x).mean(1))


def squared_error(out: Tensor, y: Tensor) -> Tensor:
    """Squared error to one-hot targets, summed, divided by the batch size."""
    return ((out - F.one_hot(y, out.shape[1]).to(out.dtype)) ** 2).sum() / len(out)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]],
          loss: Callable[[Tensor, Tensor], Tensor] = squared_error) -> None:
    """One step a batch."""
    for x, y in batches:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()


def token_batches(count: int, size: int = 8, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches for `TokenNet`, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 7, 16, generator=generator, dtype=torch.float64),
             torch.randint(0, 10, (size,), generator=generator)) for _ in range(count)]


def leave() -> None:
    """Ends a worker process at once: gloo's threads at times abort an interpreter that ends."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def factors_of(tensors: Mapping[str, Tensor]) -> dict[Side, Factor]:
    """Running statistics as a refresh takes them, from stacked tensors by their names."""
    attention = {statistic.key: statistic for statistic in vars(curvature.attention).values()
                 if isinstance(statistic, Statistic)}
    forms = {'moment': Moment(), 'columns': Columns(), 'mean': Mean(), 'square': Square()}
    found: dict[Side, Factor] = {}
    for name, tensor in tensors.items():
        if name == 'weight':
            found[WEIGHT] = Factor(Moment(), (tensor,))
        elif name in attention:
            found[attention[name].side] = Factor(attention[name].form, (tensor,))
        else:
            side, form = name.split('_')
            found[{'input': INPUT, 'gradient': GRADIENT}[side]] = Factor(forms[form], (tensor,))
    return found
