"""Random models and batches of MMDetection and MMPretrain, to measure costs."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.registry import MODELS, init_default_scope
from torch import nn


def random_model(cfg: Any) -> nn.Module:
    """Builds the model of a config with random weights, in training mode."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if 'data_preprocessor' in cfg and 'data_preprocessor' not in cfg.model:
        cfg.model.data_preprocessor = cfg.data_preprocessor  # as MMEngine's runner does
    model: nn.Module = MODELS.build(cfg.model)
    return model.train()


def synthetic_batch(model: nn.Module, images: int, size: tuple[int, int]) -> dict[str, Any]:
    """Arguments of a model's `forward` with mode='loss': noise with random boxes or classes.

    Args:
        model: A detector or a classifier with its data preprocessor.
        images: Number of images.
        size: Height and width.

    Raises:
        TypeError: If the model is neither a detector nor a classifier.
    """
    kinds = {kind.__module__.split('.')[0] for kind in type(model).__mro__}
    if 'mmdet' in kinds:
        from mmdet.testing import demo_mm_inputs

        masks = bool(getattr(getattr(model, 'roi_head', None), 'with_mask', False))
        packed = demo_mm_inputs(
            images,
            [(3, *size)] * images,
            num_items=[8] * images,
            num_classes=_count_classes(model),
            with_mask=masks,
        )
    elif 'mmpretrain' in kinds:
        from mmpretrain.structures import DataSample

        classes = _count_classes(model)
        drawn = torch.randint(classes, (images,)).tolist()
        packed = dict(
            inputs=list(torch.randint(256, (images, 3, *size), dtype=torch.uint8)),
            data_samples=[DataSample().set_gt_label(label) for label in drawn],
        )
    else:
        raise TypeError(
            f'{type(model).__name__} is neither a detector of MMDetection nor a '
            'classifier of MMPretrain: there is no synthetic batch for it'
        )
    preprocess: Any = model.data_preprocessor
    return dict(preprocess(packed, True))


def _count_classes(model: nn.Module) -> int:
    """Largest number of classes of a model's heads (a proposal head has one)."""
    counts = [getattr(module, 'num_classes', None) for module in model.modules()]
    return max((count for count in counts if isinstance(count, int)), default=10)
