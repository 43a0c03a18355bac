"""Batched linear algebra on stacks of symmetric matrices: pure functions of tensors."""

from .inverse import cholesky_inverse, newton_inverse
from .spectrum import largest_eigenvalue

__all__ = ['cholesky_inverse', 'largest_eigenvalue', 'newton_inverse']
