"""Models of the toolboxes with random weights, and batches of noise for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmprecond.engine import launch
from mmprecond.engine.synthetic import random_model, synthetic_batch

CONFIGS = {
    'resnet18': 'mmpretrain::resnet/resnet18_8xb32_in1k.py',
    'resnet50': 'mmpretrain::resnet/resnet50_8xb32_in1k.py',
    'swin-t': 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
    'faster-rcnn-r50': 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'mask-rcnn-swin-t': 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
}


def build_model(name: str, device: torch.device | str = 'cpu') -> nn.Module:
    """Returns a model of `CONFIGS`, or of a config file, in training mode."""
    torch.manual_seed(0)
    cfg = launch.load_config(CONFIGS.get(name, name))
    launch.check_mmcv(cfg.get('default_scope'))
    return random_model(cfg).to(device)


def noise(model: nn.Module, batch: int, size: tuple[int, int], count: int) -> list[dict[str, Any]]:
    """Returns different batches, as the moments of a single batch would have a low rank."""
    batches = [synthetic_batch(model, batch, size) for _ in range(count)]
    if any(one['mode'] != 'loss' for one in batches):
        raise ValueError(f'there are no synthetic labels for {type(model).__name__}, so no loss')
    return batches
