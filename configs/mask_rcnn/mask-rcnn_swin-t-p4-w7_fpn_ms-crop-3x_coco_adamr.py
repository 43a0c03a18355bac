# Mask R-CNN Swin-T-FPN, 3x schedule: AdamR (thesis, table 4.6).
_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py'

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
    schedule='3x',
    optimizer='AdamR',
    result=dict(APb=46.9, APb50=68.9, APb75=51.6, APm=42.3, APm50=65.8, APm75=45.4),
)
