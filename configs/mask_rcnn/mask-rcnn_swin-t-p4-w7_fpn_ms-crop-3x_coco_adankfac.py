# Mask R-CNN Swin-T-FPN, 3x schedule: AdaNKFAC (thesis, table 3.9).
_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py'

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
    schedule='3x',
    optimizer='AdaNKFAC',
    result=dict(APb=46.9, APb50=68.6, APb75=51.5, APm=42.3, APm50=65.8, APm75=45.6),
)
