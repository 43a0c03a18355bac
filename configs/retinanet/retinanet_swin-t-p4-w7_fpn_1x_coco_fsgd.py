# RetinaNet Swin-T-FPN, 1x schedule: FSGD (thesis, table 5.1).
_base_ = 'mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='FSGD',
        settings='published',
        lr=0.01,
        momentum=0.9,
        weight_decay=1e-4,
        stat_interval=50,
        refresh_interval=500,
    ),
)

paper = dict(
    table='5.1',
    detector='retinanet',
    backbone='swin-t',
    schedule='1x',
    optimizer='FSGD',
    result=dict(AP=37.7, AP50=58.3, AP75=39.8, APs=23.4, APm=41.3, APl=50.4),
)
