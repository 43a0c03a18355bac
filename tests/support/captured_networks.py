"""What a capture finds of a whole network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmprecond.optimizers import NKFAC
from tests.support.capture import compare, staged

Captured = dict[str, tuple[Tensor, Tensor, int]]


def captured(model: nn.Module, backward: Callable[[NKFAC], None], **options: Any) -> Captured:
    """What a new optimizer captures of `backward`, by weight name."""
    optimizer = NKFAC(model, lr=0.1, **options, settings='published')
    optimizer.zero_grad()
    backward(optimizer)
    found = {
        layer.name: staged(optimizer, layer.name) for layer in optimizer.curvature.capture.staged
    }
    optimizer.disarm()
    return found


def same(ours: Captured, theirs: Captured, rtol: float = 1e-12) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        compare(ours[name], theirs[name], rtol)


def image(n: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(n, 2, 7, 8, generator=torch.Generator().manual_seed(seed)).double()
