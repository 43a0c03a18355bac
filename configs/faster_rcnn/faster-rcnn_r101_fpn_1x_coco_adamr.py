# Faster R-CNN R101-FPN, 1x schedule: AdamR (thesis, table 4.5).
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py'

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
    backbone='r101',
    schedule='1x',
    optimizer='AdamR',
    result=dict(AP=41.5, AP50=61.9, AP75=45.3, APs=24.0, APm=45.1, APl=55.6),
)
