"""The loss along two directions through a model's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_count, check_number
from .loss import Loss


@dataclass(frozen=True)
class Surface:
    """Losses on a grid.

    Attributes:
        first, second: Coordinates (m,) along the directions, in their own lengths.
        values: Losses (m, m); row i has the coordinate ``first[i]``.
    """

    first: Tensor
    second: Tensor
    values: Tensor


def random_directions(loss: Loss, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two random directions (n,), normalised by filter.

    Each filter (a slice of a weight along its first dimension) has the norm of the model's own
    filter; directions are zero for 1-D parameters. Directions of networks of different scales are
    then comparable.

    Source: Li et al., Visualizing the Loss Landscape of Neural Nets (arXiv 1712.09913), section 4.
    """
    generator = torch.Generator(loss.params[0].device).manual_seed(seed)

    def draw() -> Tensor:
        pieces = []
        for p in loss.params:
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device)
            if p.ndim < 2:
                noise.zero_()
            else:
                dims = tuple(range(1, p.ndim))
                sizes = torch.linalg.vector_norm(p.detach(), dim=dims, keepdim=True)
                noise *= sizes / torch.linalg.vector_norm(noise, dim=dims, keepdim=True)
            pieces.append(noise)
        return loss.flatten(pieces)

    return draw(), draw()


def find_surface(
    loss: Loss,
    first: Tensor,
    second: Tensor,
    span: float = 1.0,
    points: int = 21,
    progress: bool = False,
) -> Surface:
    """Losses on a grid along two directions.

    Args:
        loss: The loss, whose parameters are the middle of the grid.
        first: Direction (n,) of the rows.
        second: Direction (n,) within a row.
        span: Largest coordinate; the grid reaches from -span to span.
        points: Points m on a side; an odd number has the middle itself.
        progress: Whether to show a progress bar, which needs tqdm.
    """
    check_number('span', span)
    check_count('points', points, low=2)
    grid = torch.linspace(-span, span, points, dtype=torch.float64)
    rows = grid.tolist()
    if progress:
        from tqdm import tqdm

        rows = tqdm(rows, desc='surface')
    values = []
    for x in rows:
        for y in grid.tolist():
            with loss.displaced(x * first + y * second):
                values.append(loss.value())
    return Surface(grid, grid, torch.tensor(values, dtype=torch.float64).view(points, points))
