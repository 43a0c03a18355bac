"""DCT-AdamW's rule: AdamW on a few columns of each gradient's cosine transform."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_flag
from ..linalg import cosine_basis, matmul_precision
from .adam import AdamW
from .base import Group, State, moments_of
from .matrix import MatrixRule

COLUMN_NORMS = ('l1', 'l2')


class DCTAdamWRule(MatrixRule):
    """AdamW on the gradient's largest cosine coefficients for matrices, AdamW for the rest.

    A (m, s) is the gradient, transposed if m < s. Q (s, s) is the cosine basis, and c are the
    largest columns of ``A Q``. The reduced gradient is ``a = A Q_c`` (m, r). If AdamW's update for
    a is u, the update of the matrix is ``u Q_c'``.

    Args:
        rank: Largest r; r is s if that is less.
        refresh_interval: Steps between choices of c; the first step chooses.
        rotate_subspace: Whether columns that stay chosen keep their moments, and the moments of new
            columns start at zero. Otherwise the moments keep their positions.
        error_feedback: Whether ``A - a Q_c'`` is added to the next gradient.
        norm: Norm that decides which columns are largest, 'l1' or 'l2'.
        max_dim: A matrix with a larger side takes AdamW.
    """

    exact = ('exp_avg', 'exp_avg_sq', 'columns', 'error')

    def __init__(
        self,
        rank: int = 128,
        refresh_interval: int = 1,
        rotate_subspace: bool = True,
        error_feedback: bool = False,
        norm: str = 'l1',
        max_dim: int = 31999,
    ) -> None:
        super().__init__(max_dim)
        check_count('rank', rank)
        check_count('refresh_interval', refresh_interval)
        check_flag('rotate_subspace', rotate_subspace)
        check_flag('error_feedback', error_feedback)
        check_choice('norm', norm, COLUMN_NORMS)
        self.rank = rank
        self.refresh_interval = refresh_interval
        self.rotate_subspace = rotate_subspace
        self.error_feedback = error_feedback
        self.norm = norm
        self._bases: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def too_large(self, shape: tuple[int, int], group: Group) -> str:
        return 'its larger side' if max(shape) > self.max_dim else ''

    def state_shapes(self, shape: tuple[int, int], group: Group) -> dict[str, tuple[int, ...]]:
        rank = min(self.rank, *shape)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
            ('exp_avg', 'exp_avg_sq'), (max(shape), rank)
        )
        return {**shapes, 'columns': (rank,), **({'error': shape} if self.error_feedback else {})}

    def basis(self, like: Tensor) -> Tensor:
        """Cosine basis for the columns of a tensor; computed once for each size."""
        key = (like.shape[-1], like.dtype, like.device)
        if key not in self._bases:
            self._bases[key] = cosine_basis(*key)
        return self._bases[key]

    def matrix_updates(self, directions: list[Tensor], states: list[State], group: Group) -> Tensor:
        if self.error_feedback:
            errors = moments_of(states, 'error', directions)
            directions = list(torch._foreach_add(directions, errors))
        matrix = torch.stack(directions)
        wide = matrix.shape[-2] < matrix.shape[-1]
        matrix = matrix.mT if wide else matrix
        with matmul_precision('highest'):
            if states[0].get('step', 0) % self.refresh_interval == 0:
                self._select_columns(matrix, states)
            rows = self.basis(matrix).mT[torch.stack([state['columns'] for state in states])]
            reduced = matrix @ rows.mT
            if self.error_feedback:
                error = matrix - reduced @ rows
                torch._foreach_copy_(
                    [state['error'] for state in states], list(error.mT if wide else error)
                )
            small = list(reduced)
            update = torch.stack(AdamW.compute_updates(self, small, small, states, group)) @ rows
        return update.mT if wide else update

    def _select_columns(self, matrix: Tensor, states: list[State]) -> None:
        """Chooses new columns of the basis and maps the moments to them."""
        transform = matrix @ self.basis(matrix)
        sizes = (transform.abs() if self.norm == 'l1' else transform.square()).sum(-2)
        # In the basis' order: the same columns, chosen in another order, change nothing.
        selected = sizes.topk(min(self.rank, sizes.shape[-1])).indices.sort().values
        if self.rotate_subspace and 'exp_avg' in states[0]:
            old_columns = torch.stack([state['columns'] for state in states])
            # Q_old' Q_new, whose entries are 0 and 1.
            rotation = (old_columns[:, :, None] == selected[:, None, :]).to(matrix.dtype)
            for name in ('exp_avg', 'exp_avg_sq'):
                moments = [state[name] for state in states]
                torch._foreach_copy_(moments, list(torch.stack(moments) @ rotation))
        for state, columns in zip(states, selected, strict=True):
            state['columns'] = columns.clone()
