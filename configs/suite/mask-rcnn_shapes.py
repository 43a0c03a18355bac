# The small Swin Mask R-CNN on shapes, with a warm-up and a cosine schedule.
_base_ = '../quickstart/mask-rcnn_swin_shapes.py'

param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=50, T_max=950, end=1000),
]
