# Mask R-CNN Swin-T, 1x schedule, AFOpt on attention and G R^-1 elsewhere (the thesis's
# Ada_AFOpt), with the schedule's own AdamW as rule.
_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', '../_base_/afopt.py']

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='Preconditioned',
        rule=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
        layers={{_base_.afopt}},
        matmul_precision='highest',
    ),
    # The published code knows linear layers and Conv2d alone.
    paramwise_cfg=dict(custom_keys={'mask_head.upsample': dict(precondition=False)}),
)
