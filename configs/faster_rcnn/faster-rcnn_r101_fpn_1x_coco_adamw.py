# Faster R-CNN R101-FPN, 1x schedule: AdamW (thesis, table 4.5).
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py'

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.2)
)

paper = dict(
    table='4.5',
    detector='faster_rcnn',
    backbone='r101',
    schedule='1x',
    optimizer='AdamW',
    result=dict(AP=40.1, AP50=60.6, AP75=43.8, APs=22.9, APm=44.1, APl=52.8),
)
