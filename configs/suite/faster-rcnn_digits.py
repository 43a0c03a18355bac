# The narrow detector on handwritten digits in photographs, with a warm-up and a cosine schedule.
_base_ = '../quickstart/faster-rcnn_r18_fpn_digits_narrow.py'

param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=50, T_max=950, end=1000),
]
