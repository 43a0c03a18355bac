"""Whole Hessians and preconditioners as dense matrices, column by column."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian


def dense(product: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Matrix (size, size) of a linear map."""
    unit = torch.eye(size, dtype=torch.float64)
    return torch.stack([product(column) for column in unit], 1)


def full_hessian(
    model: nn.Module, loss_function: Callable[[Tensor, Tensor], Tensor], batches: list[tuple]
) -> Tensor:
    """Hessian (n, n) of the mean loss by torch.func, of a model in eval mode."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    shapes = [dict(model.named_parameters())[name].shape for name in names]
    point = torch.cat([dict(model.named_parameters())[n].detach().flatten() for n in names])

    def loss(vector: Tensor) -> Any:
        pieces = vector.split([shape.numel() for shape in shapes])
        values = {n: v.view(s) for n, v, s in zip(names, pieces, shapes, strict=True)}
        losses = [loss_function(functional_call(model, values, (x,)), y) for x, y in batches]
        return sum(losses) / len(losses)

    return hessian(loss)(point)


def full_gauss_newton(
    model: nn.Module,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    batches: list[tuple],
    mode: str,
) -> Tensor:
    """Gauss-Newton matrix (n, n): the mean of J' L J, from whole Jacobians."""
    copy = deepcopy(model).train(mode == 'train')
    own = [p for p in copy.parameters() if p.requires_grad]
    size = sum(p.numel() for p in own)
    total = torch.zeros(size, size).double()
    for inputs, targets in batches:
        outputs = copy(inputs)
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(out, own, retain_graph=True)])
            for out in outputs.flatten()
        ]
        jacobian = torch.stack(rows)
        inner = hessian(lambda flat, o=outputs, t=targets: loss_function(flat.view_as(o), t))(
            outputs.detach().flatten()
        )
        total += jacobian.T @ inner @ jacobian
    return total / len(batches)
