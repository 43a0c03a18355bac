"""Products with the Hessian: by second derivatives, or by differences of gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_choice
from .loss import Loss

logger = logging.getLogger('mmprecond')

#: Ways to multiply by the Hessian.
WAYS = ('auto', 'exact', 'differences')
#: Largest distance of an exact product from a difference; kinks of ReLU make some.
FARTHEST = 0.5


def choose_product(loss: Loss, way: str = 'auto') -> Callable[[Tensor], Tensor]:
    """Product of the Hessian and a vector (n,).

    Args:
        loss: The loss.
        way: 'exact': a second backward pass. 'differences': a central difference of gradients.
            'auto' (default): 'exact', unless the model has an operation without a second
            derivative, such as RoIAlign. Such an operation raises an error, or takes its gradient
            for a constant; so a product is compared with a difference first. The log says how far
            differences at two distances are apart.

    Raises:
        RuntimeError: For 'exact' where an operation has no second derivative and says so.
    """
    check_choice('way', way, WAYS)
    if way == 'exact':
        return loss.hessian_product
    generator = torch.Generator(loss.params[0].device).manual_seed(0)
    like = loss.point()
    probe = torch.randn(len(like), generator=generator, dtype=like.dtype, device=like.device)
    step = torch.finfo(like.dtype).eps ** (1 / 3)
    near, far = (loss.difference_product(probe, scale * step) for scale in (0.5, 1.0))
    if way == 'auto':
        try:
            exact = loss.hessian_product(probe)
        except RuntimeError as error:
            logger.info('no second derivative (%s)', str(error).splitlines()[0])
        else:
            if _apart(near, exact) <= FARTHEST:
                return loss.hessian_product
            logger.warning(
                'second derivatives are %.1e apart from differences of gradients: an operation '
                'without a second derivative may count as constant',
                _apart(near, exact),
            )
    logger.info(
        'products are differences of gradients; at two distances they are %.1e apart',
        _apart(near, far),
    )
    return loss.difference_product


def _apart(first: Tensor, second: Tensor) -> float:
    """Distance of two vectors in units of the longer one."""
    longest = torch.maximum(first.norm(), second.norm()).clamp(min=1e-30)
    return float((first - second).norm() / longest)
