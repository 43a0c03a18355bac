# Mask R-CNN Swin-T-FPN, 1x schedule: AdaAFOpt (thesis, table 5.2).
_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='AdaAFOpt',
        settings='published',
        lr=1e-4,
        betas=(0.9, 0.999),
        weight_decay=0.05,
        stat_interval=50,
        refresh_interval=500,
    ),
    # The published code knows linear layers and Conv2d alone.
    paramwise_cfg=dict(custom_keys={'mask_head.upsample': dict(precondition=False)}),
)

paper = dict(
    table='5.2',
    detector='mask_rcnn',
    backbone='swin-t',
    schedule='1x',
    optimizer='AdaAFOpt',
    result=dict(APb=43.4, APb50=65.8, APb75=47.5, APm=39.8, APm50=62.7, APm75=42.7),
)
