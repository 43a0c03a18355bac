# Mask R-CNN R101-FPN, 1x schedule: AdamR (thesis, table 4.6).
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r101_fpn_1x_coco.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='AdamR',
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
    table='4.6',
    detector='mask_rcnn',
    backbone='r101',
    schedule='1x',
    optimizer='AdamR',
    result=dict(APb=42.1, APb50=62.5, APb75=46.0, APm=38.3, APm50=59.8, APm75=41.1),
)
