# The quickstart's detector at half the backbone's width, with a narrow pyramid and box head, for
# comparisons of many runs; with a warm-up, as detectors are trained.
_base_ = 'faster-rcnn_r18_fpn_shapes.py'

width = 64  # of the pyramid and of all heads

model = dict(
    backbone=dict(base_channels=32, stem_channels=32),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=width),
    rpn_head=dict(in_channels=width, feat_channels=width),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width),
        bbox_head=dict(in_channels=width, fc_out_channels=256),
    ),
)
param_scheduler = [dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30)]
