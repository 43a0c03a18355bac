# RetinaNet Swin-T-FPN, 1x schedule: AFOpt (thesis, table 5.1).
_base_ = 'mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='AFOpt',
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
    optimizer='AFOpt',
    result=dict(AP=38.5, AP50=59.0, AP75=40.8, APs=22.4, APm=41.9, APl=51.5),
)
