# Faster R-CNN R50-FPN, 1x schedule: NKFAC (thesis, table 3.7).
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='NKFAC',
        settings='published',
        lr=0.02,
        momentum=0.9,
        weight_decay=1e-4,
        stat_interval=100,
        refresh_interval=1000,
    ),
)

paper = dict(
    table='3.7',
    detector='faster_rcnn',
    backbone='r50',
    schedule='1x',
    optimizer='NKFAC',
    result=dict(AP=39.7, AP50=60.7, AP75=43.0, APs=23.4, APm=43.3, APl=51.5),
)
