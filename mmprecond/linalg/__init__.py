"""Batched linear algebra on stacks of symmetric matrices: pure functions of tensors."""

from .basis import assign_columns, eigenbasis, orthogonal_iteration
from .cosine import cosine_basis
from .inverse import all_finite, cholesky_inverse, newton_inverse
from .lowrank import (
    apply_columns,
    columns_to_matrix,
    low_rank_power,
    nystrom_columns,
    power_of_columns,
)
from .precision import PRECISIONS, matmul_precision, rounded
from .products import add_product, stacked_product
from .roots import inverse_power, newton_schulz_inverse_root
from .spectrum import largest_eigenvalue, largest_eigenvalue_of_columns

__all__ = ['PRECISIONS', 'add_product', 'all_finite', 'apply_columns', 'assign_columns',
           'cholesky_inverse', 'columns_to_matrix', 'cosine_basis', 'eigenbasis', 'inverse_power',
           'largest_eigenvalue', 'largest_eigenvalue_of_columns', 'low_rank_power',
           'matmul_precision', 'newton_inverse', 'newton_schulz_inverse_root', 'nystrom_columns',
           'orthogonal_iteration', 'power_of_columns', 'rounded', 'stacked_product']
