"""The precision of float32 products on a GPU, by role."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: Precisions: float32 throughout, or TensorFloat-32, whose factors have 10 bits after the point.
PRECISIONS = ('highest', 'high')


@contextmanager
def matmul_precision(level: str) -> Iterator[None]:
    """Sets the precision of float32 products on NVIDIA GPUs, whatever the user's setting is.

    Sums are in float32 at either level; products of other dtypes and on other devices stay.

    Args:
        level: One of `PRECISIONS`.
    """
    backend = torch.backends.cuda.matmul
    if hasattr(backend, 'fp32_precision'):  # torch >= 2.9
        name, wanted = 'fp32_precision', 'ieee' if level == 'highest' else 'tf32'
    else:
        name, wanted = 'allow_tf32', level != 'highest'  # type: ignore[assignment]
    before = getattr(backend, name)
    setattr(backend, name, wanted)
    try:
        yield
    finally:
        setattr(backend, name, before)
