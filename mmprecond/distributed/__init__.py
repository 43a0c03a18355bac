"""How sums travel between ranks."""

from .reduce import rank, sum_over_ranks, world_size

__all__ = ['rank', 'sum_over_ranks', 'world_size']
