"""Sums over ranks, in few messages and in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

#: Size of messages.
BUCKET_MB = 64.0
#: Size of messages that a sum sends ahead, before its result is needed.
AHEAD_MB = 256.0


def world_size() -> int:
    """Number of ranks that train together; 1 when torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among the ranks."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_ranks(tensors: Sequence[Tensor], bucket_mb: float = BUCKET_MB) -> None:
    """Sums tensors over all ranks, in place (see `start_sum`)."""
    start_sum(tensors, bucket_mb)()


def start_sum(tensors: Sequence[Tensor], bucket_mb: float = BUCKET_MB) -> Callable[[], None]:
    """Starts to sum tensors over all ranks, in place.

    Every rank must call this, and then the returned function, with tensors of the same shapes and
    dtypes in the same order. Until then the tensors must not be used.

    Args:
        tensors: The tensors, on one device.
        bucket_mb: Messages are filled up to this many megabytes.

    Returns:
        A function that completes the sums. It also sends what exceeds `AHEAD_MB`, because messages
        under way take memory.
    """
    if world_size() == 1:
        return _nothing
    waiting = list(sum_buckets(tensors, bucket_mb))
    started: list[tuple[list[Tensor], Tensor, Any]] = []
    ahead = 0.0
    while waiting and ahead < AHEAD_MB:
        bucket = waiting.pop(0)
        message = _flatten_dense_tensors(bucket)
        started.append((bucket, message, dist.all_reduce(message, async_op=True)))
        ahead += megabytes(bucket)

    def finish() -> None:
        for bucket, message, work in started:
            work.wait()
            _write(bucket, message)
        started.clear()
        for bucket in waiting:
            message = _flatten_dense_tensors(bucket)
            dist.all_reduce(message)
            _write(bucket, message)

    return finish


def _nothing() -> None:
    """The end of a sum over one rank."""


def sum_buckets(tensors: Iterable[Tensor], bucket_mb: float = BUCKET_MB) -> Iterator[list[Tensor]]:
    """Yields the tensors of each message of a sum."""
    bucket: list[Tensor] = []
    held = 0.0
    for tensor in tensors:
        size = megabytes([tensor])
        if bucket and (held + size > bucket_mb or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0.0
        bucket.append(tensor)
        held += size
    if bucket:
        yield bucket


def megabytes(tensors: Iterable[Tensor]) -> float:
    """Size of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


def _write(bucket: list[Tensor], message: Tensor) -> None:
    torch._foreach_copy_(bucket, list(_unflatten_dense_tensors(message, bucket)))
