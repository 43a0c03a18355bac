"""Model families of MMEngine's toolboxes, on drawn data that a CPU can train on.

A family is a toolbox's own config. Its model, optimizer and schedules by iteration stay. Its data,
batch size, length and hooks are ours. Pretrained weights, random augmentation, validation,
schedules by epoch and mixed precision are removed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from PIL import Image, ImageDraw

from mmprecond.datasets import CLASSES, make_shape_folders, make_shapes
from mmprecond.engine import launch

SIZE = 160  # pixels of a drawn image
KEYPOINTS = 17  # as many as COCO's
#: Hooks that would replace the pipeline of a data set; they are removed.
PIPELINE_HOOKS = ('YOLOXModeSwitchHook', 'PipelineSwitchHook', 'mmdet.PipelineSwitchHook')


@dataclass(frozen=True)
class Family:
    """A toolbox's config.

    Attributes:
        config: Name of the config, as TOOLBOX::FOLDER/NAME.
        batch: Images of a batch.
        masks: Whether a detector learns masks.
        size: Size of the images that the model sees; a pose model's config has its own.
    """

    config: str
    batch: int = 2
    masks: bool = False
    size: int = 128

    @property
    def toolbox(self) -> str:
        """Name of the toolbox's package."""
        return self.config.partition('::')[0]


_SEG, _ROTATE = 'mmseg::', 'mmrotate::'
_POSE = 'mmpose::body_2d_keypoint/'
#: Models that no test but the tool's own trains, five of each toolbox.
FAMILIES = {
    'DETR R50': Family('mmdet::detr/detr_r50_8xb2-150e_coco'),
    'DINO R50': Family('mmdet::dino/dino-4scale_r50_8xb2-12e_coco', size=256),  # 900 queries
    'RTMDet-tiny': Family('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco', batch=4),
    'YOLOX-tiny': Family('mmdet::yolox/yolox_tiny_8xb8-300e_coco', batch=4),
    'Mask R-CNN ConvNeXt-T': Family(
        'mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco', masks=True
    ),
    'ViT-B (fine-tuned after MAE)': Family(
        'mmpretrain::mae/benchmarks/vit-base-p16_8xb128-coslr-100e_in1k', size=224
    ),
    'BEiT-B (fine-tuned)': Family(
        'mmpretrain::beit/benchmarks/beit-base-p16_8xb128-coslr-100e_in1k', size=224
    ),
    'ConvNeXt-T': Family('mmpretrain::convnext/convnext-tiny_32xb128_in1k', batch=4),
    'DeiT-T': Family('mmpretrain::deit/deit-tiny_4xb256_in1k', batch=4, size=224),
    'EfficientNet-B0': Family('mmpretrain::efficientnet/efficientnet-b0_8xb32_in1k', batch=8),
    'SegFormer-B0': Family(f'{_SEG}segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512', batch=4),
    'UPerNet Swin-T': Family(
        f'{_SEG}swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512'
    ),
    'UPerNet ConvNeXt-T': Family(
        f'{_SEG}convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512'
    ),
    'FCN HRNet-W18': Family(f'{_SEG}hrnet/fcn_hr18_4xb4-80k_ade20k-512x512', batch=4),
    'SegNeXt-T': Family(f'{_SEG}segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512', batch=4),
    'Rotated RetinaNet R50': Family(
        f'{_ROTATE}rotated_retinanet/rotated-retinanet-rbox-le90_r50_fpn_1x_dota'
    ),
    'Rotated Faster R-CNN R50': Family(
        f'{_ROTATE}rotated_faster_rcnn/rotated-faster-rcnn-le90_r50_fpn_1x_dota'
    ),
    'S2ANet R50': Family(f'{_ROTATE}s2anet/s2anet-le135_r50_fpn_1x_dota'),
    'Oriented R-CNN Swin-T': Family(
        f'{_ROTATE}oriented_rcnn/oriented-rcnn-le90_swin-tiny_fpn_1x_dota'
    ),
    'RoI Transformer R50': Family(f'{_ROTATE}roi_trans/roi-trans-le90_r50_fpn_1x_dota'),
    'SimpleBaseline R50': Family(
        f'{_POSE}topdown_heatmap/coco/td-hm_res50_8xb64-210e_coco-256x192', batch=4
    ),
    'HRNet-W32': Family(f'{_POSE}topdown_heatmap/coco/td-hm_hrnet-w32_8xb64-210e_coco-256x192'),
    'HRFormer-S': Family(
        f'{_POSE}topdown_heatmap/coco/td-hm_hrformer-small_8xb32-210e_coco-256x192'
    ),
    'ViTPose-S': Family(f'{_POSE}topdown_heatmap/coco/td-hm_ViTPose-small_8xb64-210e_coco-256x192'),
    'RTMPose-t': Family(f'{_POSE}rtmpose/coco/rtmpose-t_8xb256-420e_coco-256x192', batch=4),
}
#: Models to compare that the tests of this project train too.
USUAL = {
    'Faster R-CNN R50': Family('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco'),
    'Mask R-CNN Swin-T': Family('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco', masks=True),
    'ResNet-18': Family('mmpretrain::resnet/resnet18_8xb32_in1k', batch=8),
}


def make_data(root: Path, images: int = 64) -> Path:
    """Draws shapes, with boxes, masks, maps of classes, rotated boxes and keypoints."""
    make_shapes(root, images=images, size=SIZE, split='train', progress=False)
    make_shape_folders(root / 'folders', images=images, size=224, split='train', progress=False)
    content = json.loads((root / 'annotations/train.json').read_text())
    for folder in ('maps', 'labels'):
        (root / folder).mkdir(exist_ok=True)
    for image in content['images']:
        shapes = [one for one in content['annotations'] if one['image_id'] == image['id']]
        stem = Path(image['file_name']).stem
        canvas = Image.new('L', (SIZE, SIZE))
        for shape in shapes:
            corners = list(map(tuple, np.reshape(shape['segmentation'][0], (-1, 2))))
            ImageDraw.Draw(canvas).polygon(corners, fill=shape['category_id'])
        canvas.save(root / f'maps/{stem}.png')
        (root / f'labels/{stem}.txt').write_text(''.join(map(_rotated_box, shapes)))
    for shape in content['annotations']:
        points = np.reshape(shape['segmentation'][0], (-1, 2))
        chosen = points[np.linspace(0, len(points) - 1, KEYPOINTS).astype(int)]
        visible = np.full((KEYPOINTS, 1), 2)
        shape['keypoints'] = np.concatenate([chosen, visible], 1).ravel().tolist()
        shape['num_keypoints'], shape['category_id'] = KEYPOINTS, 1
    content['categories'] = [dict(id=1, name='person')]
    (root / 'annotations/keypoints.json').write_text(json.dumps(content))
    return root


def _rotated_box(shape: dict[str, Any]) -> str:
    """A line of DOTA's format: the corners of a box, its class and its difficulty."""
    x, y, width, height = shape['bbox']
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    return f'{" ".join(f"{c:.2f}" for c in corners)} {CLASSES[shape["category_id"] - 1]} 0\n'


def make_config(family: Family, data: Path, iterations: int, saved: int, seed: int) -> Config:
    """A family's config for some iterations on drawn data, without random augmentation.

    Args:
        family: The family.
        data: Folder from `make_data`.
        iterations: Number of iterations.
        saved: Iterations between checkpoints.
        seed: Seed of the weights and of everything random in an iteration.
    """
    settings = launch.load_config(family.config).to_dict()
    _drop_pretrained(settings)
    cfg = Config(settings)
    loader: dict[str, Any] = dict(batch_size=family.batch, num_workers=0, persistent_workers=False)
    sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.train_dataloader = loader | dict(
        sampler=sampler, dataset=_DATA_SETS[family.toolbox](family, cfg, data)
    )
    for split in ('val', 'test'):
        for key in ('dataloader', 'cfg', 'evaluator'):
            cfg[f'{split}_{key}'] = None
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=10**6)
    schedulers = cfg.get('param_scheduler') or []
    schedulers = [schedulers] if isinstance(schedulers, dict) else schedulers
    cfg.param_scheduler = [one for one in schedulers if not one.get('by_epoch', True)]
    cfg.default_hooks = dict(
        logger=dict(type='LoggerHook', interval=1),
        param_scheduler=dict(type='ParamSchedulerHook'),
        checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=saved),
    )
    hooks = [hook for hook in cfg.get('custom_hooks') or [] if hook['type'] not in PIPELINE_HOOKS]
    cfg.custom_hooks = [*hooks, dict(type='SeedHook', seed=seed)]
    imports = dict(cfg.get('custom_imports') or {}).get('imports', [])
    imports = [imports] if isinstance(imports, str) else list(imports)
    cfg.custom_imports = dict(imports=[*imports, 'common.seeding'], allow_failed_imports=False)
    cfg.randomness = dict(seed=seed)
    cfg.log_processor = dict(type='LogProcessor', window_size=10, by_epoch=False)
    cfg.optim_wrapper = launch.in_full_precision(cfg.optim_wrapper)
    cfg.load_from = None
    return cfg


def _drop_pretrained(settings: Any) -> None:
    """Removes weights to download, in place."""
    values = settings.values() if isinstance(settings, dict) else settings
    if isinstance(settings, dict):
        for key in ('init_cfg', 'pretrained'):
            held = settings.get(key)
            if isinstance(held, str) or isinstance(held, dict) and held.get('type') == 'Pretrained':
                settings[key] = None
    for value in values:
        if isinstance(value, (dict, list, tuple)):
            _drop_pretrained(value)


def _detection(family: Family, cfg: Config, data: Path) -> dict[str, Any]:
    return dict(
        type='CocoDataset',
        data_root=str(data),
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(classes=CLASSES),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=family.masks),
            dict(type='Resize', scale=(family.size, family.size), keep_ratio=True),
            dict(type='PackDetInputs'),
        ],
    )


def _classification(family: Family, cfg: Config, data: Path) -> dict[str, Any]:
    return dict(
        type='CustomDataset',
        data_root=str(data / 'folders'),
        data_prefix='train',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=family.size),
            dict(type='PackInputs'),
        ],
    )


def _segmentation(family: Family, cfg: Config, data: Path) -> dict[str, Any]:
    cfg.model.data_preprocessor.size = (family.size, family.size)
    return dict(
        type='BaseSegDataset',
        data_root=str(data),
        data_prefix=dict(img_path='train', seg_map_path='maps'),
        img_suffix='.png',
        metainfo=dict(classes=('background', *CLASSES)),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='Resize', scale=(family.size, family.size)),
            dict(type='PackSegInputs'),
        ],
    )


def _rotated_detection(family: Family, cfg: Config, data: Path) -> dict[str, Any]:
    return dict(
        type='DOTADataset',
        data_root=str(data),
        ann_file='labels/',
        data_prefix=dict(img_path='train/'),
        metainfo=dict(classes=CLASSES),
        img_suffix='png',
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=[
            dict(type='mmdet.LoadImageFromFile'),
            dict(type='mmdet.LoadAnnotations', with_bbox=True, box_type='qbox'),
            dict(type='ConvertBoxType', box_type_mapping=dict(gt_bboxes='rbox')),
            dict(type='mmdet.Resize', scale=(family.size, family.size), keep_ratio=True),
            dict(type='mmdet.PackDetInputs'),
        ],
    )


def _pose(family: Family, cfg: Config, data: Path) -> dict[str, Any]:
    kept = ('LoadImage', 'GetBBoxCenterScale', 'TopdownAffine', 'GenerateTarget', 'PackPoseInputs')
    return dict(
        type='CocoDataset',
        data_root=str(data),
        data_mode='topdown',
        ann_file='annotations/keypoints.json',
        data_prefix=dict(img='train/'),
        pipeline=[step for step in cfg.train_pipeline if step['type'] in kept],
    )


_DATA_SETS: dict[str, Callable[[Family, Config, Path], dict[str, Any]]] = {
    'mmdet': _detection,
    'mmpretrain': _classification,
    'mmseg': _segmentation,
    'mmrotate': _rotated_detection,
    'mmpose': _pose,
}
