"""The precision of float32 products, by role."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: Precisions, as torch names them: float32 throughout; TensorFloat-32, whose factors have 10 bits
#: after the point, on a GPU; and beside it bfloat16, with 7 bits, on a CPU that multiplies it.
PRECISIONS = ('highest', 'high', 'medium')


@contextmanager
def matmul_precision(level: str) -> Iterator[None]:
    """Sets the precision of float32 products, whatever the user's setting is.

    Factors are rounded, sums are in float32 at all levels; products of other dtypes stay, and so do
    those on devices without the units for it.

    Args:
        level: One of `PRECISIONS`.
    """
    if not hasattr(torch.backends.cuda.matmul, 'fp32_precision'):  # torch < 2.9: one for all
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(level)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    backends: Any = torch.backends
    precisions = {
        backends.cuda.matmul: 'ieee' if level == 'highest' else 'tf32',
        backends.mkldnn.matmul: 'bf16' if level == 'medium' else 'ieee',
    }
    previous = {backend: backend.fp32_precision for backend in precisions}
    try:
        for backend, value in precisions.items():
            backend.fp32_precision = value
        yield
    finally:
        for backend, value in previous.items():
            backend.fp32_precision = value


def rounded(tensor: Tensor) -> Tensor:
    """A tensor as products on a CPU may take it at the present precision, as float32.

    Which products do depends on the CPU and on their shape. What is summed must be the same numbers
    everywhere: the moment of rounded rows beside the sum of the rows themselves is not positive
    semi-definite.
    """
    if tensor.dtype not in (torch.float16, torch.float32) or tensor.device.type != 'cpu':
        return tensor
    products = getattr(torch.backends.mkldnn, 'matmul', None)  # torch < 2.9 has none
    level = getattr(products, 'fp32_precision', None) or torch.get_float32_matmul_precision()
    return tensor.bfloat16().float() if level in ('bf16', 'medium') else tensor
