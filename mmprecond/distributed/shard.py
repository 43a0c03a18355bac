"""Distribution of work over ranks, and exchange of its results in few messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .reduce import BUCKET_MB, megabytes, rank, world_size


def longest_first(costs: Sequence[float], ranks: int) -> list[int]:
    """Assigns each job to the rank with the least work so far, the longest jobs first.

    Args:
        costs: Cost of each job.
        ranks: Number of ranks.

    Returns:
        Ranks in the order of the jobs. The longest total is at most 4/3 of the best possible
        (Graham, 1969).
    """
    loads = [0.0] * ranks
    owners = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda k: -costs[k]):
        owners[job] = loads.index(min(loads))
        loads[owners[job]] += costs[job]
    return owners


def broadcast_from(
    owners: Sequence[int], tensors: Sequence[Tensor], bucket_mb: float = BUCKET_MB
) -> None:
    """Overwrites each tensor with that of its owner, in packed asynchronous messages.

    Every rank must call this with tensors of the same shapes and dtypes in the same order.

    Args:
        owners: Rank with the right values, for each tensor.
        tensors: The tensors, on one device.
        bucket_mb: Messages are filled up to this many megabytes.
    """
    if world_size() == 1:
        return
    pending = []
    for owner, bucket in owner_buckets(owners, tensors, bucket_mb):
        message = _flatten_dense_tensors(bucket)
        pending.append((owner, bucket, message, dist.broadcast(message, owner, async_op=True)))
    for owner, bucket, message, work in pending:
        work.wait()
        if owner != rank():
            torch._foreach_copy_(bucket, list(_unflatten_dense_tensors(message, bucket)))


def share_objects(objects: Sequence[Any], owners: Sequence[int]) -> list[Any]:
    """Returns small picklable objects, each from its owner; other ranks pass None."""
    shared = list(objects)
    for owner in sorted(set(owners)):
        message = [[shared[k] for k, other in enumerate(owners) if other == owner]]
        dist.broadcast_object_list(message, owner)
        received = iter(message[0])
        shared = [
            next(received) if other == owner else item
            for item, other in zip(shared, owners, strict=True)
        ]
    return shared


def send_to_first(
    owner: int, tensor: Tensor | None, shape: Sequence[int], like: Tensor
) -> Tensor | None:
    """Sends a tensor from its owner to rank 0, which receives it in host memory.

    Args:
        owner: Rank that has the tensor, not 0.
        tensor: The tensor on its owner, else None.
        shape: Shape of the tensor.
        like: A tensor with the same dtype and device.

    Returns:
        The tensor on rank 0, else None.
    """
    if rank() == owner:
        assert tensor is not None, 'its owner has no such tensor'
        dist.send(tensor.contiguous(), 0)
    elif rank() == 0:
        arriving = like.new_empty(shape)
        dist.recv(arriving, owner)
        return arriving.cpu()
    return None


def owner_buckets(
    owners: Sequence[int], tensors: Sequence[Tensor], bucket_mb: float = BUCKET_MB
) -> list[tuple[int, list[Tensor]]]:
    """Owner and tensors of each message of `broadcast_from`; each has one owner and one dtype."""
    buckets: list[tuple[int, list[Tensor]]] = []
    open_ones: dict[tuple[int, torch.dtype], tuple[float, list[Tensor]]] = {}
    for owner, tensor in zip(owners, tensors, strict=True):
        size = megabytes([tensor])
        held, bucket = open_ones.get((owner, tensor.dtype), (0.0, []))
        if not bucket or held + size > bucket_mb:
            held, bucket = 0.0, []
            buckets.append((owner, bucket))
        bucket.append(tensor)
        open_ones[owner, tensor.dtype] = held + size, bucket
    return buckets
