"""The largest stable learning rate at the present weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_count, check_installed
from ..optimizers import PreconditionedOptimizer
from ..rules import EMASGD, SGDM, AdamW
from .loss import Loss
from .preconditioned import check_map, direction_map
from .products import choose_product


class StableRate(NamedTuple):
    """A learning rate with what it was found from.

    Attributes:
        rate: Largest stable learning rate, for the group whose rate is largest.
        eigenvalue: Largest eigenvalue of the scaled, preconditioned Hessian (see `largest_rate`).
        bound: Largest stable product of the rate and the eigenvalue.
    """

    rate: float
    eigenvalue: float
    bound: float


def largest_rate(
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    product: str = 'auto',
    vectors: int = 40,
    tolerance: float = 0.01,
) -> StableRate:
    """Finds the rate above which steps along the sharpest direction grow.

    Near the present weights a step of SGD or Adam is a linear recursion in ``S P H``: the Hessian
    H, the map P of the preconditioner (see `preconditioner_of`), and a diagonal S with the rates of
    the groups relative to the largest one and, for Adam, one over the root of its second moment. It
    is stable if the rate times the largest eigenvalue is below a bound (see `stability_bound`).
    Weight decay and clipping are left out. The curvature changes in training: the rate is where to
    start a search.

    Source: Cohen et al., Gradient Descent on Neural Networks Typically Occurs at the Edge of
    Stability (arXiv 2103.00065), appendix B, and Adaptive Gradient Methods at the Edge of Stability
    (arXiv 2207.14484), section 2.

    Args:
        loss: The loss.
        optimizer: SGD, Adam or AdamW of torch, or an optimizer of this package with the rule SGDM,
            EMASGD or AdamW. It must have taken steps if it is adaptive or preconditions.
        product: How the Hessian is multiplied: see `choose_product`; default: 'auto'.
        vectors: Arnoldi vectors that are kept; default: 40.
        tolerance: Relative accuracy of the eigenvalue; default: 0.01.

    Returns:
        The rate with its eigenvalue; it is infinite if no eigenvalue is positive.

    Raises:
        ValueError: If the optimizer is another one, or has taken no step.
        ImportError: If scipy is missing.
    """
    check_count('vectors', vectors, low=3)
    check_installed('scipy', 'the largest stable rate')
    bound = stability_bound(optimizer)
    multiply = choose_product(loss, product)
    precondition = _map(optimizer, loss)
    scale = _scale(optimizer, loss)

    def apply(vector: Tensor) -> Tensor:
        return scale * precondition(multiply(vector))

    eigenvalue = _rightmost(apply, loss.parameter_vector(), vectors, tolerance)
    return StableRate(bound / eigenvalue if eigenvalue > 0 else float('inf'), eigenvalue, bound)


def stability_bound(optimizer: torch.optim.Optimizer) -> float:
    """Largest stable product of rate and eigenvalue, for a momentum m.

    It is ``2 (1 + m)`` for SGD, divided by ``1 - dampening``; ``2 (1 + m) / (1 + 2 m)`` for
    Nesterov's momentum; and ``2 (1 + m) / (1 - m)`` where the momentum is a moving average, as in
    Adam.

    Raises:
        ValueError: If the optimizer's steps are of another kind.
    """
    group = optimizer.param_groups[0]
    rule = optimizer.rule if isinstance(optimizer, PreconditionedOptimizer) else None
    kind = type(optimizer if rule is None else rule)
    if isinstance(optimizer, PreconditionedOptimizer):
        check_map(optimizer)
    if kind in (torch.optim.SGD, SGDM):
        momentum = group['momentum']
        nesterov = group.get('nesterov') or getattr(rule, 'nesterov', False)
        damped = 1 - (group.get('dampening', 0) if momentum else 0)
        if damped <= 0:
            raise ValueError('with dampening=1 SGD never moves; set less')
        return 2 * (1 + momentum) / ((1 + 2 * momentum) if nesterov else damped)
    if kind is EMASGD:
        return 2 * (1 + group['momentum']) / (1 - group['momentum'])
    if kind in (torch.optim.Adam, torch.optim.AdamW, AdamW):
        return 2 * (1 + group['betas'][0]) / (1 - group['betas'][0])
    raise ValueError(
        f'the stable rate of {kind.__name__} is not known; it is for SGD, Adam, AdamW, and for '
        'NKFAC, FSGD, AFOpt, KFAC and their adaptive forms'
    )


def _map(optimizer: torch.optim.Optimizer, loss: Loss) -> Callable[[Tensor], Tensor]:
    if isinstance(optimizer, PreconditionedOptimizer):
        return direction_map(optimizer, loss)
    return lambda vector: vector


def _scale(optimizer: torch.optim.Optimizer, loss: Loss) -> Tensor:
    """Diagonal (n,) of S."""
    groups = {p: group for group in optimizer.param_groups for p in group['params']}
    largest = max(float(group['lr']) for group in optimizer.param_groups)
    pieces: list[Tensor | None] = []
    for p in loss.params:
        if (group := groups.get(p)) is None:
            pieces.append(None)
            continue
        share = float(group['lr']) / largest if largest else 1.0
        pieces.append(torch.full_like(p, share) / _root(optimizer.state.get(p, {}), group))
    return loss.flatten(pieces).detach()


def _root(state: dict[str, Any], group: dict[str, Any]) -> Tensor | float:
    """Adam's divisor at the present step; 1 for SGD."""
    if 'betas' not in group:
        return 1.0
    if 'exp_avg_sq' not in state:
        raise ValueError('Adam has no second moment of a parameter yet; take some steps first')
    second: Tensor = state['max_exp_avg_sq' if group.get('amsgrad') else 'exp_avg_sq']
    root = (second / (1 - group['betas'][1] ** float(state['step']))).sqrt()
    return root + group['eps']


def _rightmost(
    product: Callable[[Tensor], Tensor], like: Tensor, vectors: int, tolerance: float
) -> float:
    """Largest real part of the eigenvalues of a linear map, by Arnoldi (ARPACK)."""
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigs

    size = len(like)
    if size <= 2:  # too small for ARPACK
        matrix = torch.stack([product(unit) for unit in torch.eye(size).to(like)], 1)
        return float(torch.linalg.eigvals(matrix).real.max())

    def multiply(vector: Any) -> Any:
        return product(torch.as_tensor(vector).to(like).flatten()).cpu().numpy()

    operator = LinearOperator((size, size), matvec=multiply, dtype=like.cpu().numpy().dtype)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, generator=generator).to(like.dtype).numpy()
    kept = min(vectors, size)
    try:
        values = eigs(
            operator, 1, which='LR', v0=start, ncv=kept, tol=tolerance, return_eigenvectors=False
        )
    except ArpackError as error:
        raise ValueError(
            f'the largest eigenvalue was not found ({error}); take more vectors, or a larger '
            'tolerance'
        ) from error
    return float(values.real.max())
