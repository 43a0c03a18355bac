"""Batched linear algebra on stacks of symmetric matrices: pure functions of tensors."""

from .basis import assign_columns, eigenbasis, orthogonal_iteration
from .inverse import (
    all_finite,
    cholesky_inverse,
    newton_inverse,
    woodbury_apply,
    woodbury_inverse,
)
from .roots import inverse_power, newton_schulz_inverse_root
from .spectrum import largest_eigenvalue

__all__ = ['all_finite', 'assign_columns', 'cholesky_inverse', 'eigenbasis', 'inverse_power',
           'largest_eigenvalue', 'newton_inverse', 'newton_schulz_inverse_root',
           'orthogonal_iteration', 'woodbury_apply', 'woodbury_inverse']
