"""Small networks, their batches and losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference.factors import Loss


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


class MatrixNet(nn.Module):
    """The network of SOAP's golden trajectory: no biases, and gradients of full rank."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 16, bias=False)
        self.fc2 = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc2(x + F.gelu(self.fc1(x)))).mean(1)


def squared_error(out: Tensor, y: Tensor) -> Tensor:
    """Squared error to one-hot targets, summed, divided by the batch size."""
    return ((out - F.one_hot(y, out.shape[1]).to(out.dtype)) ** 2).sum() / len(out)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor] = squared_error,
) -> None:
    """One step a batch."""
    for x, y in batches:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()


def token_batches(count: int, size: int = 8, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches for `TokenNet`, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 7, 16, generator=generator, dtype=torch.float64),
            torch.randint(0, 10, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def classification(make: Any) -> Callable[[int], list[Loss]]:
    """Squared errors of ConvNet on small images, or of TokenNet on tokens."""

    def losses(step: int) -> list[Loss]:
        generator = torch.Generator().manual_seed(step)
        shape = (3, 3, 5, 6) if make is ConvNet else (3, 4, 16)
        x = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3
        y = torch.randint(0, 10, (3,), generator=generator)
        return [lambda model: squared_error(model(x), y)]

    return losses
