"""Preconditioner of an optimizer as a linear map, at its present operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.directions import Transformed, recover_norms, transform_all
from ..optimizers import PreconditionedOptimizer
from ..rules import SGDM
from .loss import Loss


def preconditioner_of(optimizer: torch.optim.Optimizer, loss: Loss) -> Callable[[Tensor], Tensor]:
    """Linear map P, symmetric positive definite, that turns a gradient into a step's direction.

    The operators of the last refresh stay fixed, and so do the scalars of norm recovery, which are
    those of the present gradient. P is block-diagonal. On layers without an operator it is the
    identity.

    Args:
        optimizer: An optimizer of this package with the rule SGDM, such as NKFAC.
        loss: The loss whose parameters the vectors (n,) stand for.

    Returns:
        A function from vectors (n,) to vectors (n,).

    Raises:
        ValueError: If the optimizer has no curvature, a rule other than SGDM, a method that acts
            after the rule (AdamR, SOAP, Shampoo, AdaAct, AdaFisher), or no operator yet.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, PreconditionedOptimizer):
        raise ValueError(f'{name} has no preconditioner; take an optimizer such as NKFAC')
    if not isinstance(optimizer.rule, SGDM):
        raise ValueError(
            f'{name} scales entries by their own history, so that its preconditioner is not '
            'symmetric; take one on SGD, such as NKFAC, FSGD, AFOpt or KFAC'
        )
    return direction_map(optimizer, loss)


def check_map(optimizer: PreconditionedOptimizer) -> None:
    """Raises ValueError if a method acts after the rule: no map of gradients describes it."""
    for method in (stack.method for stack in optimizer.curvature.stacks):
        if method.acts_after_rule:
            raise ValueError(
                f'{method.title} changes the updates of the rule, so that no map P of gradients '
                'describes it; take NKFAC, FSGD, AFOpt or KFAC'
            )


def direction_map(optimizer: PreconditionedOptimizer, loss: Loss) -> Callable[[Tensor], Tensor]:
    """Linear map from a gradient (n,) to the rule's direction (n,); see `preconditioner_of`.

    Raises:
        ValueError: If a method acts after the rule, each rank has a part of the operators, or
            there are none yet.
    """
    if optimizer.curvature.sharding.mode == 'apply':
        raise ValueError("under sharding='apply' a rank holds only its part of the operators")
    check_map(optimizer)
    stacks = optimizer.curvature.stacks
    tensors = _by_parameter(loss, loss.gradient())
    scalars = [_recovery(batch) for batch in transform_all(stacks, tensors)]
    if not scalars:
        raise ValueError('the optimizer has no operators yet; take some steps with it first')

    def product(vector: Tensor) -> Tensor:
        tensors = _by_parameter(loss, vector)
        for batch, scalar in zip(transform_all(stacks, tensors), scalars, strict=True):
            if scalar is not None:
                batch.scale(scalar)
            batch.write(tensors)
        return loss.flatten([tensors[p] for p in loss.params])

    return product


def _by_parameter(loss: Loss, vector: Tensor) -> dict[Tensor, Tensor]:
    return dict(zip(loss.params, loss.unflatten(vector), strict=True))


def _recovery(batch: Transformed) -> Tensor | None:
    """Scalars (k * parts,) of norm recovery, or None without it; 1 for a part that is zero."""
    if not batch.parts or batch.results is batch.given:
        return None
    before = _part_norms(batch)
    recover_norms([batch])
    return torch.where(before > 0, _part_norms(batch) / before, 1.0)


def _part_norms(batch: Transformed) -> Tensor:
    return torch.stack([row.norm() for row in batch.rows(batch.results)])
