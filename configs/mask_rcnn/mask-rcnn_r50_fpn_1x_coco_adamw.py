# Mask R-CNN R50-FPN, 1x schedule: AdamW (thesis, table 4.6).
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.2)
)

paper = dict(
    table='4.6',
    detector='mask_rcnn',
    backbone='r50',
    schedule='1x',
    optimizer='AdamW',
    result=dict(APb=37.8, APb50=58.7, APb75=41.0, APm=35.4, APm50=56.2, APm75=38.0),
)
