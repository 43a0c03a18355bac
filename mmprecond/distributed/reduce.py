"""Sums over ranks, in few messages and in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


def world_size() -> int:
    """Number of ranks that train together; 1 when torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among the ranks."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_ranks(tensors: Sequence[Tensor], bucket_mb: float = 64.0) -> None:
    """Sums tensors over all ranks, in place.

    Every rank must call this with tensors of the same shapes and dtypes in the same order.

    Args:
        tensors: The tensors, on one device.
        bucket_mb: Messages are filled up to this many megabytes.
    """
    if world_size() == 1:
        return
    bucket: list[Tensor] = []
    size = 0.0
    for tensor in tensors:
        megabytes = tensor.numel() * tensor.element_size() / 2**20
        if bucket and (size + megabytes > bucket_mb or tensor.dtype != bucket[0].dtype):
            _sum_bucket(bucket)
            bucket, size = [], 0.0
        bucket.append(tensor)
        size += megabytes
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(bucket: list[Tensor]) -> None:
    message = _flatten_dense_tensors(bucket)
    dist.all_reduce(message)
    torch._foreach_copy_(bucket, list(_unflatten_dense_tensors(message, bucket)))
