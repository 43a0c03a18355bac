# Mask R-CNN Swin-T-FPN, twice the 1x schedule: AdaNKFAC (thesis, table 3.9).
_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='AdaNKFAC',
        settings='published',
        lr=1e-4,
        betas=(0.9, 0.999),
        weight_decay=0.2,
        stat_interval=100,
        refresh_interval=1000,
    ),
    # The published code knows linear layers and Conv2d alone.
    paramwise_cfg=dict(custom_keys={'mask_head.upsample': dict(precondition=False)}),
)
train_cfg = dict(max_epochs=24)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', begin=0, end=24, by_epoch=True, milestones=[16, 22], gamma=0.1),
]

paper = dict(
    table='3.9',
    detector='mask_rcnn',
    backbone='swin-t',
    schedule='2x',
    optimizer='AdaNKFAC',
    result=dict(APb=46.2, APb50=68.2, APb75=50.5, APm=41.7, APm50=65.1, APm75=45.0),
)
