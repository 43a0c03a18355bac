"""Double backward: unsupported modules, means over ranks, and graphs of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import first_line
from ..curvature import qualified_name
from ..distributed import sum_over_ranks, world_size

#: Beginnings of qualified names, and a way out.
_ONCE_DIFFERENTIABLE = {
    'mmcv.ops.roi_align.': 'a one-stage detector',
    'mmcv.ops.roi_pool.': 'a one-stage detector',
    'mmcv.ops.prroi_pool.': 'a one-stage detector',
    'mmcv.ops.deform_conv.': 'plain convolutions (dcn=None)',
    'mmcv.ops.modulated_deform_conv.': 'plain convolutions (dcn=None)',
    'mmcv.ops.multi_scale_deform_attn.': 'a detector without deformable attention',
    'mmcv.ops.sync_bn.': 'torch.nn.BatchNorm2d',
    'torch.nn.modules.batchnorm.SyncBatchNorm': 'torch.nn.BatchNorm2d',
    'torchvision.ops.roi_align.': 'a one-stage detector',
}
_ONCE_DIFFERENTIABLE_ON_CUDA = {
    'mmcv.ops.focal_loss.': 'use_sigmoid=True with a loss in plain torch',
    'mmdet.models.losses.focal_loss.FocalLoss': 'a loss in plain torch, such as '
    'CrossEntropyLoss(use_sigmoid=True)',
}


def refuse_single_backward(model: nn.Module, owner: str) -> None:
    """Raises ValueError, with an alternative, if a module of the model has no second derivative.

    Args:
        model: The model.
        owner: Name of the optimizer that differentiates twice.
    """
    unsupported = _ONCE_DIFFERENTIABLE | (
        _ONCE_DIFFERENTIABLE_ON_CUDA if torch.cuda.is_available() else {}
    )
    for name, module in model.named_modules():
        kind: Any = type(module)
        for beginning, instead in unsupported.items():
            if qualified_name(kind).startswith(beginning):
                raise ValueError(
                    f'{name} is a {kind.__name__}, which cannot be differentiated '
                    f'twice as {owner} needs; use {instead}, or another optimizer'
                )
        if getattr(module, 'with_cp', False):
            raise ValueError(
                f'{name} has with_cp=True, whose recomputation cannot be '
                f'differentiated twice as {owner} needs; set with_cp=False'
            )


def differentiate_again(
    gradients: Sequence[Tensor], params: Sequence[Tensor], weights: Sequence[Tensor], keep: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of ``sum <g, w>`` over gradients g with weights w.

    Args:
        gradients: Gradients with a graph.
        params: Parameters to differentiate with respect to.
        weights: A weight for each gradient, of its shape.
        keep: Whether the graph stays for another call.

    Returns:
        A gradient for each parameter, None where there is no dependence.

    Raises:
        ValueError: If an operation of the model has no second derivative.
    """
    try:
        return torch.autograd.grad(gradients, params, weights, retain_graph=keep, allow_unused=True)
    except RuntimeError as error:
        if 'is not implemented' not in str(error):
            raise
        raise ValueError(
            f'the model cannot be differentiated twice ({first_line(error)}); for fused attention, '
            'run the forward pass under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)'
        ) from error


def fill_missing(groups: Sequence[dict[str, Any]]) -> set[Tensor]:
    """Gives zero gradients to parameters that other ranks used and this one did not.

    Args:
        groups: The optimizer's parameter groups.

    Returns:
        The parameters that received a zero gradient.
    """
    filled: set[Tensor] = set()
    if world_size() == 1:
        return filled
    trained = [p for group in groups for p in group['params'] if p.requires_grad]
    users = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
    sum_over_ranks([users])
    for p, count in zip(trained, users.tolist(), strict=True):
        if count and p.grad is None:
            p.grad = torch.zeros_like(p)
            filled.add(p)
    return filled


def mean_over_ranks(tensors: list[Tensor]) -> None:
    """Averages tensors over the ranks, in place."""
    if world_size() > 1:
        sum_over_ranks(tensors)
        torch._foreach_div_(tensors, world_size())


def detach_gradients(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    """Frees the graph of all gradients, which is part of a reference cycle with the parameters.

    Args:
        groups: The optimizer's parameter groups.

    Returns:
        The gradients.
    """
    gradients = []
    for group in groups:
        for p in group['params']:
            if p.grad is not None:
                p.grad = p.grad.detach()
                gradients.append(p.grad)
    return gradients
