# Mask R-CNN Swin-T-FPN, twice the 1x schedule: AdamW (thesis, table 3.9).
_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'

optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05))
train_cfg = dict(max_epochs=24)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', begin=0, end=24, by_epoch=True, milestones=[16, 22], gamma=0.1),
]

paper = dict(
    table='3.9',
    detector='mask_rcnn',
    backbone='swin-t',
    schedule='2x',
    optimizer='AdamW',
    result=dict(APb=45.2, APb50=67.3, APb75=49.4, APm=41.0, APm50=64.3, APm75=44.0),
)
