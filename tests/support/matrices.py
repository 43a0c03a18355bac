"""Parameters that are matrices, and steps on given gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SHAPES = ((8, 11), (11, 7), (11, 7), (7, 3, 2, 2), (9, 9), (6,), (), (1, 3), (3, 1))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameters(shapes: Any = SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(draw(*shape, seed=k)) for k, shape in enumerate(shapes)]


def step(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], gradients: list[Tensor]
) -> None:
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    optimizer.step()
