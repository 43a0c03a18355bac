"""Vectors that stand for all tensors of a list, end to end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .precision import at_least_float32


def flatten_like(tensors: Iterable[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """Vector (n,) of tensors in the shapes of others, in float32 at least; None is zeros."""
    pairs = zip(tensors, like, strict=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if tensor is None else tensor)
            .flatten()
            .to(at_least_float32(p.dtype))
            for tensor, p in pairs
        ]
    )


def unflatten_like(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a vector (n,) in the shapes of tensors with n entries together."""
    pieces = vector.split([p.numel() for p in like])
    return [piece.view_as(p) for p, piece in zip(like, pieces, strict=True)]
