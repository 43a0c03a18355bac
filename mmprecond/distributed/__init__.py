"""Sums over ranks, and distribution of work over ranks."""

from .reduce import rank, sum_over_ranks, world_size
from .shard import broadcast_from, longest_first, send_to_first, share_objects

__all__ = [
    'broadcast_from',
    'longest_first',
    'rank',
    'send_to_first',
    'share_objects',
    'sum_over_ranks',
    'world_size',
]
