"""Parameters and steps for SOAA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmprecond.optimizers import SOAA

SHAPES = ((3, 4), (3,), (), (2, 3, 2, 2))
HYPER: dict[str, Any] = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, gamma=0.3)


def tensors(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES
    ]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(value) for value in tensors(0)]


def step(optimizer: SOAA, params: list[nn.Parameter], gradients: list[Tensor], loss: Any) -> None:
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    optimizer.loss = loss
    optimizer.step()
