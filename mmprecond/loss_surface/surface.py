"""The loss along two directions through a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
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
    filter; 1-D parameters stay as they are. Directions of networks of different scales are then
    comparable.

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
        return loss.join(pieces)

    return draw(), draw()


def surface_rows(
    loss: Loss, first: Tensor, second: Tensor, span: float = 1.0, points: int = 21
) -> Iterator[tuple[int, Tensor]]:
    """Yields the rows of a surface, so that a caller can show how far it is.

    Args:
        loss: The loss, whose parameters are the middle of the grid.
        first: Direction (n,) of the rows.
        second: Direction (n,) within a row.
        span: Largest coordinate; the grid reaches from -span to span.
        points: Points m on a side; an odd number has the middle itself.

    Yields:
        The number of a row and its losses (m,), from the first to the last.
    """
    check_number('span', span)
    check_count('points', points, low=2)
    grid = torch.linspace(-span, span, points, dtype=torch.float64).tolist()
    for row, x in enumerate(grid):
        values = []
        for y in grid:
            with loss.moved(x * first + y * second):
                values.append(loss.value())
        yield row, torch.tensor(values, dtype=torch.float64)


def find_surface(
    loss: Loss, first: Tensor, second: Tensor, span: float = 1.0, points: int = 21
) -> Surface:
    """Losses on a grid along two directions (see `surface_rows`)."""
    rows = [values for _, values in surface_rows(loss, first, second, span, points)]
    grid = torch.linspace(-span, span, points, dtype=torch.float64)
    return Surface(grid, grid, torch.stack(rows))
