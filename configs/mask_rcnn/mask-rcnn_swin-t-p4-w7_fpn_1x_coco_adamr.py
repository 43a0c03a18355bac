# Mask R-CNN Swin-T-FPN, 1x schedule: AdamR (thesis, table 4.6).
_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='AdamR',
        settings='published',
        lr=1e-4,
        betas=(0.9, 0.999),
        weight_decay=0.02,
        stat_interval=100,
        refresh_interval=1000,
    ),
    # The published code knows linear layers and Conv2d alone.
    paramwise_cfg=dict(custom_keys={'mask_head.upsample': dict(precondition=False)}),
)

paper = dict(
    table='4.6',
    detector='mask_rcnn',
    backbone='swin-t',
    schedule='1x',
    optimizer='AdamR',
    result=dict(APb=43.3, APb50=66.0, APb75=47.4, APm=40.0, APm50=62.9, APm75=42.8),
)
