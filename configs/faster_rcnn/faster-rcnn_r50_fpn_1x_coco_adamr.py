# Faster R-CNN R50-FPN, 1x schedule: AdamR (thesis, table 4.5).
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='AdamR',
        settings='published',
        lr=1e-4,
        betas=(0.9, 0.999),
        weight_decay=0.2,
        stat_interval=100,
        refresh_interval=1000,
    ),
)

paper = dict(
    table='4.5',
    detector='faster_rcnn',
    backbone='r50',
    schedule='1x',
    optimizer='AdamR',
    result=dict(AP=39.1, AP50=60.1, AP75=42.4, APs=22.2, APm=42.8, APl=51.6),
)
