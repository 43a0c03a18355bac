# RetinaNet Swin-T-FPN, 1x schedule: NKFAC (thesis, table 3.8).
_base_ = 'mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='NKFAC',
        settings='published',
        lr=0.01,
        momentum=0.9,
        weight_decay=1e-4,
        stat_interval=100,
        refresh_interval=1000,
    ),
)

paper = dict(
    table='3.8',
    detector='retinanet',
    backbone='swin-t',
    schedule='1x',
    optimizer='NKFAC',
    result=dict(AP=40.7, AP50=61.7, AP75=43.3, APs=25.2, APm=43.9, APl=53.9),
)
