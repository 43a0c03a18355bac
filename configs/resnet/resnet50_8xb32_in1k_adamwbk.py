# ResNet-50, ImageNet: AdamWBK (thesis, table 4.4).
# Rate and decay are uncertain: they are taken to be those of AdamR, which are in doubt too.
_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='AdamWBK',
        settings='published',
        lr=5e-4,
        betas=(0.9, 0.999),
        weight_decay=0.3,
        stat_interval=200,
        refresh_interval=2000,
    ),
)

paper = dict(
    data='ImageNet', table='4.4', model='ResNet50', optimizer='AdamWBK', result=dict(top1=76.63)
)
