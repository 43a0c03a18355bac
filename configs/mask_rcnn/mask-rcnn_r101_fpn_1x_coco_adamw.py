# Mask R-CNN R101-FPN, 1x schedule: AdamW (thesis, table 4.6).
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r101_fpn_1x_coco.py'

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.2)
)

paper = dict(
    table='4.6',
    detector='mask_rcnn',
    backbone='r101',
    schedule='1x',
    optimizer='AdamW',
    result=dict(APb=40.7, APb50=61.1, APb75=44.6, APm=37.2, APm50=58.4, APm75=40.1),
)
