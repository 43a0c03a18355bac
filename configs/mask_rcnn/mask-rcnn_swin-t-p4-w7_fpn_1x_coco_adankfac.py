# Mask R-CNN Swin-T-FPN, 1x schedule: AdaNKFAC (thesis, table 3.9).
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

paper = dict(
    table='3.9',
    detector='mask_rcnn',
    backbone='swin-t',
    schedule='1x',
    optimizer='AdaNKFAC',
    result=dict(APb=43.6, APb50=65.7, APb75=47.5, APm=40.1, APm50=62.9, APm75=43.4),
)
