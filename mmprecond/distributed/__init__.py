"""Sums over ranks, and distribution of work over ranks."""

from .reduce import megabytes, rank, start_sum, sum_buckets, sum_over_ranks, world_size
from .shard import broadcast_from, longest_first, owner_buckets, send_to_first, share_objects

__all__ = [
    'broadcast_from',
    'longest_first',
    'megabytes',
    'owner_buckets',
    'rank',
    'send_to_first',
    'share_objects',
    'start_sum',
    'sum_buckets',
    'sum_over_ranks',
    'world_size',
]
