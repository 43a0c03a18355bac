"""Products with the Hessian or the Gauss-Newton matrix."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_choice
from .loss import Loss

logger = logging.getLogger('mmprecond')

#: Matrices of second derivatives.
MATRICES = ('hessian', 'gauss-newton')
#: Ways to multiply by the Hessian.
PRODUCTS = ('auto', 'exact', 'differences')
#: Largest distance of an exact product from a difference, for a model with operations of its own.
MAX_DIFFERENCE = 0.5


def choose_product(
    loss: Loss, product: str = 'auto', matrix: str = 'hessian'
) -> Callable[[Tensor], Tensor]:
    """Product of the Hessian, or of the Gauss-Newton matrix, and a vector (n,).

    Args:
        loss: The loss.
        product: How the Hessian is multiplied. 'exact': a second backward pass. 'differences': a
            central difference of gradients. 'auto' (default): 'exact', unless the model has an
            operation without a second derivative, such as RoIAlign. Such an operation raises an
            error or silently treats its gradient as constant. For custom operations the product is
            therefore checked against a difference. The log says how far differences at two
            distances are apart.
        matrix: 'hessian' (default) or 'gauss-newton', which a classifier has.

    Raises:
        ValueError: For 'exact' where an operation has no second derivative and says so, and for
            'gauss-newton' if the loss is no criterion of outputs.
    """
    check_choice('product', product, PRODUCTS)
    check_choice('matrix', matrix, MATRICES)
    if matrix == 'gauss-newton':
        loss.check_output_losses()
        return loss.gauss_newton_vector_product
    if product != 'differences' and _is_exact(loss, product == 'exact'):
        return loss.hessian_vector_product
    probe = loss.gradient()
    near, far = (loss.difference_vector_product(probe, share) for share in (0.5, 1.0))
    logger.info(
        'products are differences of gradients; at two distances they are %.1e apart',
        _relative_difference(near, far),
    )
    return loss.difference_vector_product


def _is_exact(loss: Loss, wanted: bool) -> bool:
    """True if second derivatives are those of all operations, or if they are wanted anyway.

    Raises:
        ValueError: If they are wanted and an operation says that it has none.
    """
    probe = loss.gradient()
    try:
        exact = loss.hessian_vector_product(probe)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if wanted:
            raise ValueError(f"no second derivative: {reason}; take 'differences'") from error
        logger.info('no second derivative (%s)', reason)
        return False
    custom = loss.custom_operations()
    if wanted or not custom:
        return True
    difference = _relative_difference(loss.difference_vector_product(probe, 0.5), exact)
    if difference <= MAX_DIFFERENCE:
        return True
    logger.warning(
        'second derivatives are %.1e apart from differences of gradients: %s may count as constant',
        difference,
        ', '.join(sorted(custom)),
    )
    return False


def _relative_difference(first: Tensor, second: Tensor) -> float:
    """Distance of two vectors in units of the longer one."""
    longest = torch.maximum(first.norm(), second.norm()).clamp(min=1e-30)
    return float((first - second).norm() / longest)
