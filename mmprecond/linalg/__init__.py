"""Batched linear algebra on stacks of symmetric matrices: pure functions of tensors."""

from .basis import assign_columns, eigenbasis, orthogonal_iteration
from .cosine import cosine_basis
from .inverse import all_finite, cholesky_inverse, definite_newton_inverse, newton_inverse
from .kronecker import Kronecker, KroneckerBasis, kronecker_power
from .lowrank import (
    RankSearch,
    apply_columns,
    columns_to_matrix,
    low_rank_power,
    nystrom_columns,
    power_of_columns,
)
from .matrices import add_to_diagonal, identity_like, trace
from .operators import (
    BlockDiagonal,
    Dense,
    Diagonal,
    LowRank,
    Operator,
    Operators,
    RankOne,
    Shape,
    count_flops,
    expected_shapes,
    from_tensors,
    join,
    map_tensors,
    named_tensors,
    take,
    unify,
    write,
)
from .positions import PositionBasis, PositionMatrix, position_power
from .precision import PRECISIONS, at_least_float32, matmul_precision, rounded
from .products import add_product, stacked_product
from .proximal import shrink_rows
from .roots import inverse_power, newton_schulz_inverse_root, newton_schulz_inverse_root_of_values
from .spectrum import largest_eigenvalue, largest_eigenvalue_of_columns
from .vectors import flatten_like, unflatten_like

__all__ = [
    'BlockDiagonal',
    'Dense',
    'Diagonal',
    'Kronecker',
    'KroneckerBasis',
    'LowRank',
    'Operator',
    'Operators',
    'PRECISIONS',
    'PositionBasis',
    'PositionMatrix',
    'RankOne',
    'RankSearch',
    'Shape',
    'add_product',
    'add_to_diagonal',
    'all_finite',
    'apply_columns',
    'at_least_float32',
    'assign_columns',
    'cholesky_inverse',
    'columns_to_matrix',
    'cosine_basis',
    'count_flops',
    'eigenbasis',
    'expected_shapes',
    'flatten_like',
    'from_tensors',
    'identity_like',
    'inverse_power',
    'join',
    'kronecker_power',
    'largest_eigenvalue',
    'largest_eigenvalue_of_columns',
    'low_rank_power',
    'map_tensors',
    'matmul_precision',
    'named_tensors',
    'definite_newton_inverse',
    'newton_inverse',
    'newton_schulz_inverse_root',
    'newton_schulz_inverse_root_of_values',
    'nystrom_columns',
    'orthogonal_iteration',
    'position_power',
    'power_of_columns',
    'rounded',
    'shrink_rows',
    'stacked_product',
    'take',
    'trace',
    'unflatten_like',
    'unify',
    'write',
]
