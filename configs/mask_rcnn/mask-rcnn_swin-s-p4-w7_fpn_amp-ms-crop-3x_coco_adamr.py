# Mask R-CNN Swin-S-FPN, 3x schedule, AMP as in MMDetection (which has no other Swin-S config):
# AdamR (thesis, table 4.6).
_base_ = 'mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py'

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
    backbone='swin-s',
    schedule='3x',
    optimizer='AdamR',
    result=dict(APb=49.0, APb50=70.5, APb75=54.1, APm=43.6, APm50=67.6, APm75=47.0),
)
