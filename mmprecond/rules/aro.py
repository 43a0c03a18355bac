"""ARO's rule: a normalised momentum step in a rotated basis, for matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, check_number
from ..linalg import matmul_precision
from .adam import AdamW
from .base import Group, State, moments_of
from .matrix import MatrixRule

ROTATED_SIDES = ('left', 'right', 'smaller')

#: Passes of the Sinkhorn normalisation.
PASSES = 5

#: Largest norm of a row that counts as a rounding error, in units of machine epsilon times the
#: norm of the matrix. Measured norms of such rows were at most 2 for tall matrices, and 33 for a
#: softmax head, where they grow with the condition number.
ROUNDING = 1000

#: Root mean square of a matrix's update. AdamW's is about the same, so both share a learning rate.
RMS = 0.2


class ARORule(MatrixRule):
    """ARO for matrices, AdamW for other parameters.

    G (m, n) is the direction, transposed if the right side is rotated. A step computes the momentum
    ``M <- mu M + (1 - mu) G`` and the rotation ``R <- Q factor of M f(R' M)'`` (m, m). The update
    is ``R f(R' M)`` with the new R, scaled to a root mean square of 0.2.

    Args:
        norm: The normalisation f. 'sinkhorn' scales rows to length sqrt(n), then columns to length
            sqrt(m), five times. 'row_norm' scales rows to length sqrt(n). 'sign' takes signs.
        max_dim: A matrix whose rotated side is larger takes AdamW.
    """

    hyper: ClassVar[tuple[str, ...]] = (*AdamW.hyper, 'momentum', 'side')
    defaults = dict(momentum=0.95, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, side='left')
    linear_moments: ClassVar[tuple[str, ...]] = ('momentum_buffer', 'exp_avg')
    exact = ('momentum_buffer', 'rotation')

    def __init__(self, norm: str = 'sinkhorn', max_dim: int = 8192) -> None:
        super().__init__(max_dim)
        check_choice('norm', norm, NORMS)
        self.norm = norm

    @classmethod
    def check(cls, group: Group) -> None:
        super().check(group)
        check_number('momentum', group['momentum'], high=1)
        check_choice('side', group['side'], ROTATED_SIDES)

    def too_large(self, shape: tuple[int, int], group: Group) -> str:
        right = _is_right(shape, group)
        return f'its {"right" if right else "left"} side' if shape[right] > self.max_dim else ''

    def state_shapes(self, shape: tuple[int, int], group: Group) -> dict[str, tuple[int, ...]]:
        size = shape[_is_right(shape, group)]
        return {'momentum_buffer': shape, 'rotation': (size, size)}

    def matrix_updates(self, directions: list[Tensor], states: list[State], group: Group) -> Tensor:
        momenta = moments_of(states, 'momentum_buffer', directions)
        torch._foreach_lerp_(momenta, directions, 1 - group['momentum'])
        matrix = torch.stack(momenta)
        right = _is_right(tuple(matrix.shape[1:]), group)
        matrix = matrix.mT if right else matrix
        for state in states:
            if 'rotation' not in state:
                state['rotation'] = torch.eye(
                    matrix.shape[1], dtype=matrix.dtype, device=matrix.device
                )
        before = torch.stack([state['rotation'] for state in states])
        rotation, update = rotated_step(matrix, before, NORMS[self.norm])
        torch._foreach_copy_([state['rotation'] for state in states], list(rotation))
        return update.mT if right else update


def rotated_step(
    matrix: Tensor, rotation: Tensor, norm: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """One step of ARO on momenta.

    Args:
        matrix: M (k, m, n). A zero M keeps its rotation and gives a zero update.
        rotation: R (k, m, m).
        norm: The normalisation f.

    Returns:
        The new R, and updates (k, m, n) of root mean square `RMS`.
    """
    scale = matrix.abs().amax((-2, -1), keepdim=True)
    matrix = matrix / torch.where(scale > 0, scale, 1)  # squares neither over- nor underflow
    with matmul_precision('highest'):
        new = q_factor(matrix, norm(_zero_rounding_rows(rotation.mT @ matrix)))
        rotation = torch.where(scale == 0, rotation, new)
        update = rotation @ norm(_zero_rounding_rows(rotation.mT @ matrix))
    size = update.square().mean((-2, -1), keepdim=True).sqrt()
    return rotation, update * (RMS / torch.where(size > 0, size, 1))


def q_factor(matrix: Tensor, normed: Tensor) -> Tensor:
    """Orthogonal factor Q of ``M X' = Q T``, with a non-negative diagonal of T.

    The equation does not determine the columns of Q at zero rows of X, nor columns beyond the width
    of M. Householder reflections of M supply these columns, so they do not depend on rounding
    errors. The other columns span M, whatever the condition number of M X'.

    Args:
        matrix: M (k, m, n).
        normed: X (k, m, n).

    Returns:
        Q (k, m, m).
    """
    rows, rank = matrix.shape[-2], min(matrix.shape[-2:])
    frame = None
    if rows > rank:
        frame = torch.linalg.qr(matrix, mode='complete').Q
        matrix = frame[..., :rank].mT @ matrix
    null = (normed == 0).all(-1)
    order = null.byte().argsort(dim=-1, stable=True)
    used = torch.take_along_dim(normed, order[:, :rank, None], -2)
    factor, triangle = torch.linalg.qr(matrix @ used.mT)
    signs = triangle.diagonal(dim1=-2, dim2=-1).sign()
    factor = factor * torch.where(signs == 0, 1, signs)[..., None, :]
    if frame is not None:
        factor = torch.cat([frame[..., :rank] @ factor, frame[..., rank:]], -1)
    return torch.zeros_like(factor).scatter(-1, order[:, None, :].expand_as(factor), factor)


def _is_right(shape: tuple[int, ...], group: Group) -> bool:
    """True if a matrix's right side is rotated."""
    return group['side'] == 'right' or (group['side'] == 'smaller' and shape[1] < shape[0])


def _zero_rounding_rows(matrix: Tensor) -> Tensor:
    """Zero for the rows (..., m, n) that are but rounding errors, which a norm would enlarge.

    There is one such row for a softmax head, and several for a matrix with more rows than columns.
    """
    rows = torch.linalg.vector_norm(matrix, dim=-1, keepdim=True)
    total = torch.linalg.vector_norm(rows, dim=-2, keepdim=True)
    return torch.where(rows <= ROUNDING * torch.finfo(matrix.dtype).eps * total, 0, matrix)


def _scale_vectors(matrix: Tensor, dim: int, length: float) -> Tensor:
    """Scales rows (dim=-1) or columns (dim=-2) to the given length; zeros stay zero."""
    norms = torch.linalg.vector_norm(matrix, dim=dim, keepdim=True)
    return matrix * (length / torch.where(norms > 0, norms, 1))


def _row_norm(matrix: Tensor) -> Tensor:
    return _scale_vectors(matrix, -1, matrix.shape[-1] ** 0.5)


def _sinkhorn(matrix: Tensor) -> Tensor:
    for _ in range(PASSES):
        matrix = _scale_vectors(_row_norm(matrix), -2, matrix.shape[-2] ** 0.5)
    return matrix


#: Normalisations f by name.
NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    'sinkhorn': _sinkhorn,
    'row_norm': _row_norm,
    'sign': torch.sign,
}
