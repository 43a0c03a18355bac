"""Products with the Hessian or the Gauss-Newton matrix."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_choice, check_installed
from .loss import Loss

logger = logging.getLogger('mmprecond')

#: Matrices of second derivatives.
MATRICES = ('hessian', 'gauss-newton')
#: Ways to multiply by the Hessian.
WAYS = ('auto', 'exact', 'differences')
#: Largest distance of an exact product from a difference, for a model with operations of its own.
FARTHEST = 0.5


def choose_product(
    loss: Loss, way: str = 'auto', matrix: str = 'hessian'
) -> Callable[[Tensor], Tensor]:
    """Product of the Hessian, or of the Gauss-Newton matrix, and a vector (n,).

    Args:
        loss: The loss.
        way: How the Hessian is multiplied. 'exact': a second backward pass. 'differences': a
            central difference of gradients. 'auto' (default): 'exact', unless the model has an
            operation without a second derivative, such as RoIAlign. Such an operation raises an
            error, or takes its gradient for a constant; so the product with the gradient is
            compared with a difference where the model has operations that are not torch's. The log
            says how far differences at two distances are apart.
        matrix: 'hessian' (default) or 'gauss-newton', which a classifier has.

    Raises:
        ValueError: For 'exact' where an operation has no second derivative and says so, and for
            'gauss-newton' if the loss is no criterion of outputs.
        ImportError: For 'gauss-newton' without curvlinops.
    """
    check_choice('way', way, WAYS)
    check_choice('matrix', matrix, MATRICES)
    if matrix == 'gauss-newton':
        loss.check_split()
        check_installed('curvlinops', 'the Gauss-Newton matrix', 'curvlinops-for-pytorch')
        return loss.gauss_newton_product
    step = torch.finfo(loss.params[0].dtype).eps ** (1 / 3)
    probe = loss.gradient()
    if way != 'differences':
        try:
            exact = loss.hessian_product(probe)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if way == 'exact':
                raise ValueError(f"no second derivative: {reason}; take 'differences'") from error
            logger.info('no second derivative (%s)', reason)
        else:
            if way == 'exact':
                return loss.hessian_product
            custom = loss.custom_operations()
            apart = _apart(loss.difference_product(probe, step / 2), exact) if custom else 0.0
            if apart <= FARTHEST:
                return loss.hessian_product
            logger.warning(
                'second derivatives are %.1e apart from differences of gradients: %s may count as '
                'constant',
                apart,
                ', '.join(sorted(custom)),
            )
    near, far = (loss.difference_product(probe, scale * step) for scale in (0.5, 1.0))
    logger.info(
        'products are differences of gradients; at two distances they are %.1e apart',
        _apart(near, far),
    )
    return loss.difference_product


def _apart(first: Tensor, second: Tensor) -> float:
    """Distance of two vectors in units of the longer one."""
    longest = torch.maximum(first.norm(), second.norm()).clamp(min=1e-30)
    return float((first - second).norm() / longest)
