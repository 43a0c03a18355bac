"""Models with random weights and batches of noise for them, to measure costs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from mmengine.model import ImgDataPreprocessor
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

#: Height and width of an image for a model that names no size.
USUAL_SIZE = (224, 224)
#: Boxes of an image for a detector.
BOXES = 8
#: Pixels of the squares of one class in the labels of a segmentor.
SQUARE = 32


def random_model(cfg: Any) -> nn.Module:
    """Builds the model of a config with random weights, in training mode."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if 'data_preprocessor' in cfg and 'data_preprocessor' not in cfg.model:
        cfg.model.data_preprocessor = cfg.data_preprocessor  # as MMEngine's runner does
    model: nn.Module = MODELS.build(cfg.model)
    return model.train()


def own_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images that a model is made for, or `USUAL_SIZE`.

    A pose estimator has them in its codec, a segmentor in its data preprocessor.
    """
    codec = getattr(getattr(model, 'head', None), 'decoder', None)
    whole = getattr(codec, 'input_size', None)
    if whole:
        return whole[1], whole[0]
    crop = getattr(getattr(model, 'data_preprocessor', None), 'size', None)
    return (crop[0], crop[1]) if isinstance(crop, (tuple, list)) else USUAL_SIZE


def synthetic_batch(model: nn.Module, images: int, size: tuple[int, int]) -> dict[str, Any]:
    """Arguments of a model's `forward`, `mode` included.

    Models of MMDetection, MMRotate, MMPretrain and MMSegmentation get noise with random labels and
    mode='loss'. Other models get noise alone and mode='tensor': labels of MMPose, for example, are
    made by the data pipeline.

    Args:
        model: A model derived from MMEngine's `BaseModel`.
        images: Number of images.
        size: Height and width.

    Raises:
        TypeError: If the model's `forward` takes no mode.
    """
    labelled = _labelled(model, images, size)
    if labelled is None:
        return batch_without_loss(model, images, size)
    return {**labelled, 'mode': 'loss'}


def batch_without_loss(model: nn.Module, images: int, size: tuple[int, int]) -> dict[str, Any]:
    """Arguments of a model's `forward` with mode='tensor'.

    Args:
        model: A model derived from MMEngine's `BaseModel`.
        images: Number of images.
        size: Height and width.

    Raises:
        TypeError: If the model's `forward` takes no mode.
    """
    try:
        labelled = _labelled(model, images, size)  # detectors read sizes of images from it
    except Exception:  # a data preprocessor of another task raises errors of any kind
        labelled = None
    if labelled is not None:
        return {**labelled, 'mode': 'tensor'}
    parameters = inspect.signature(model.forward).parameters
    if 'mode' not in parameters:
        raise TypeError(
            f"the forward of {type(model).__name__} takes no mode, as that of MMEngine's BaseModel "
            'does: derive the model from it'
        )
    first, *others = (name for name in parameters if name != 'mode')
    required = [name for name in others if parameters[name].default is inspect.Parameter.empty]
    preprocess = getattr(model, 'data_preprocessor', None)
    inputs: Tensor = torch.rand(images, 3, *size, device=next(model.parameters()).device)
    if isinstance(preprocess, ImgDataPreprocessor):
        # The forward of subclasses may ask for labels.
        noise = dict(inputs=_noise(images, size))
        inputs = ImgDataPreprocessor.forward(preprocess, noise)['inputs']
    return {first: inputs, **dict.fromkeys(required), 'mode': 'tensor'}


def _labelled(model: nn.Module, images: int, size: tuple[int, int]) -> dict[str, Any] | None:
    """Noise with random labels, preprocessed; None for a model of an unknown toolbox."""
    packages = {kind.__module__.split('.')[0] for kind in type(model).__mro__}
    for package, pack in PACKERS.items():
        if package in packages:
            preprocess: Any = model.data_preprocessor
            return dict(preprocess(pack(model, images, size), True))
    return None


def _pack_detections(model: nn.Module, images: int, size: tuple[int, int]) -> dict[str, Any]:
    """Images with random boxes, rotated ones for models of MMRotate."""
    classes = _count_things(model)
    count = dict(num_items=[BOXES] * images, num_classes=max(2, classes))
    shapes = [(3, *size)] * images
    kinds = _box_kinds(model)
    if any(kind.__module__.split('.')[0] == 'mmrotate' for kind in kinds):
        from mmrotate.testing import demo_mm_inputs

        corners = any('QBBox' in kind.__name__ for kind in kinds)  # in place of an angle
        packed = demo_mm_inputs(images, shapes, use_box_type=True, use_qbox=corners, **count)
    else:
        from mmdet.testing import demo_mm_inputs

        packed = demo_mm_inputs(images, shapes, **_map_settings(model), **count)
    semantic = _part(model, 'semantic_head')
    for sample in packed['data_samples']:
        sample.gt_instances.labels.remainder_(classes)
        if semantic is not None:
            sample.gt_sem_seg.sem_seg.remainder_(semantic.num_classes)
    return dict(packed)


def _map_settings(model: nn.Module) -> dict[str, Any]:
    """Settings of MMDetection's batches for models that learn masks or maps of classes."""
    second = getattr(model, 'roi_head', None)
    cascaded = bool(getattr(second, 'with_semantic', False))
    panoptic = hasattr(model, 'panoptic_head')
    masks = hasattr(model, 'mask_head') or bool(getattr(second, 'with_mask', False))
    return dict(
        with_mask=panoptic or masks,
        with_semantic=panoptic or cascaded or hasattr(model, 'semantic_head'),
        sem_seg_output_strides=8 if cascaded else 1,
    )


def _part(model: nn.Module, name: str) -> Any:
    """A part of a model or of its second stage, or None."""
    second = getattr(model, 'roi_head', None)
    return getattr(model, name, None) or getattr(second, name, None)


def _count_things(model: nn.Module) -> int:
    """Number of classes of boxes; models that learn maps also have classes without boxes."""
    maps = _part(model, 'semantic_head')
    modules = [module for module in model.modules() if module is not maps]
    counts = [getattr(module, 'num_things_classes', None) for module in modules]
    return max((count for count in counts if count), default=0) or _count_classes(modules)


def _box_kinds(model: nn.Module) -> set[type]:
    """Classes of a model's modules and of their coders of boxes, some of which are no modules."""
    return {
        type(part)
        for module in model.modules()
        for part in (module, getattr(module, 'bbox_coder', None))
    }


def _pack_classes(model: nn.Module, images: int, size: tuple[int, int]) -> dict[str, Any]:
    """Images with random classes."""
    from mmpretrain.structures import DataSample

    drawn = torch.randint(_count_classes(model.modules()), (images,)).tolist()
    samples = [DataSample().set_gt_label(label) for label in drawn]
    # A list would hold views of the images for self-supervised models.
    return dict(inputs=torch.stack(_noise(images, size)), data_samples=samples)


def _pack_maps(model: nn.Module, images: int, size: tuple[int, int]) -> dict[str, Any]:
    """Images with maps of random classes in squares."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    classes = getattr(model, 'num_classes', None) or _count_classes(model.modules())
    samples = []
    for _ in range(images):
        coarse = torch.randint(classes, (1, *(-(-side // SQUARE) for side in size)))
        fine = coarse.repeat_interleave(SQUARE, 1).repeat_interleave(SQUARE, 2)
        maps = PixelData(data=fine[:, : size[0], : size[1]].clone())
        meta = dict(img_shape=size, ori_shape=size)
        samples.append(SegDataSample(gt_sem_seg=maps, metainfo=meta))
    return dict(inputs=_noise(images, size), data_samples=samples)


#: Function that draws images with labels, by the package that a model's class comes from.
PACKERS: dict[str, Callable[[nn.Module, int, tuple[int, int]], dict[str, Any]]] = {
    'mmdet': _pack_detections,
    'mmpretrain': _pack_classes,
    'mmseg': _pack_maps,
}


def _noise(images: int, size: tuple[int, int]) -> list[Tensor]:
    """Images of random bytes, as a data set gives them."""
    return list(torch.randint(256, (images, 3, *size), dtype=torch.uint8))


def _count_classes(modules: Iterable[nn.Module]) -> int:
    """Largest number of classes of a model's heads (a proposal head has one)."""
    counts = [getattr(module, 'num_classes', None) for module in modules]
    return max((count for count in counts if isinstance(count, int) and count > 0), default=10)
