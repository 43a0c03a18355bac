"""Which modules cannot be differentiated twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..curvature import qualified_name

#: Beginnings of qualified names, and a way out.
_ONCE = {
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
_ONCE_ON_CUDA = {
    'mmcv.ops.focal_loss.': 'use_sigmoid=True with a loss in plain torch',
    'mmdet.models.losses.focal_loss.FocalLoss': 'a loss in plain torch, such as '
                                                'CrossEntropyLoss(use_sigmoid=True)',
}


def refuse_single_backward(model: nn.Module) -> None:
    """Raises ValueError if a module of the model has no second derivative, naming a way out."""
    once = _ONCE | (_ONCE_ON_CUDA if torch.cuda.is_available() else {})
    for name, module in model.named_modules():
        kind: Any = type(module)
        for beginning, instead in once.items():
            if qualified_name(kind).startswith(beginning):
                raise ValueError(f'{name} is a {kind.__name__}, which cannot be differentiated '
                                 f'twice as SGDPH needs; use {instead}, or another optimizer')
        if getattr(module, 'with_cp', False):
            raise ValueError(f'{name} has with_cp=True, whose recomputation cannot be '
                             'differentiated twice as SGDPH needs; set with_cp=False')
