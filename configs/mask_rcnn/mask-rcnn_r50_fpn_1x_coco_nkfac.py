# Mask R-CNN R50-FPN, 1x schedule: NKFAC (thesis, table 3.9).
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='NKFAC',
        settings='published',
        lr=0.02,
        momentum=0.9,
        weight_decay=1e-4,
        stat_interval=100,
        refresh_interval=1000,
    ),
    # The published code knows linear layers and Conv2d alone.
    paramwise_cfg=dict(custom_keys={'mask_head.upsample': dict(precondition=False)}),
)

paper = dict(
    table='3.9',
    detector='mask_rcnn',
    backbone='r50',
    schedule='1x',
    optimizer='NKFAC',
    result=dict(APb=40.1, APb50=60.9, APb75=43.9, APm=36.6, APm50=57.9, APm75=39.2),
)
