# Faster R-CNN R50-FPN, 1x schedule: AdamW (thesis, table 4.5).
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.2)
)

paper = dict(
    table='4.5',
    detector='faster_rcnn',
    backbone='r50',
    schedule='1x',
    optimizer='AdamW',
    result=dict(AP=37.8, AP50=58.7, AP75=41.0, APs=22.1, APm=41.2, APl=49.2),
)
