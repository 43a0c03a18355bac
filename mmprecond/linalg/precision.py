"""Precision of float32 products."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: Precisions by torch's names. 'highest': float32 throughout. 'high': TensorFloat-32 (factors with
#: 10 mantissa bits) on a GPU. 'medium': also bfloat16 (7 bits) on a CPU. 'auto': 'medium' if the
#: CPU has units for bfloat16, else 'high'.
PRECISIONS = ('auto', 'highest', 'high', 'medium')


@functools.cache
def has_bfloat16_units() -> bool:
    """True if the CPU has instructions for products of bfloat16 (AMX or AVX-512)."""
    checks = ('_is_amx_tile_supported', '_is_avx512_bf16_supported')  # private: may be missing
    return any(check() for name in checks if (check := getattr(torch.cpu, name, None)))


@contextmanager
def matmul_precision(level: str) -> Iterator[None]:
    """Sets the precision of float32 products, and restores the user's setting at the end.

    Only factors are rounded; sums are in float32 at all levels. The level does not change products
    of other dtypes, nor products on devices without units for it.

    Args:
        level: One of `PRECISIONS`.
    """
    if level == 'auto':
        level = 'medium' if has_bfloat16_units() else 'high'
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
    """The tensor as float32, rounded as products on a CPU may round it at the current precision.

    The CPU and the shape of a product determine whether it rounds. All sums over the same rows must
    see the same numbers: a matrix that combines the moment of rounded rows with the sum of the
    original rows is not positive semi-definite.
    """
    if tensor.dtype not in (torch.float16, torch.float32) or tensor.device.type != 'cpu':
        return tensor
    products = getattr(torch.backends.mkldnn, 'matmul', None)  # torch < 2.9 has none
    level = getattr(products, 'fp32_precision', None) or torch.get_float32_matmul_precision()
    return tensor.bfloat16().float() if level in ('bf16', 'medium') else tensor


@functools.cache
def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The wider of a dtype and float32."""
    return torch.promote_types(dtype, torch.float32)
