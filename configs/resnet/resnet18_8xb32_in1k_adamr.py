# ResNet-18, ImageNet: AdamR (thesis, table 4.4).
# Rate and decay are uncertain: our reading of the thesis's table of them is in doubt.
_base_ = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='AdamR',
        settings='published',
        lr=0.001,
        betas=(0.9, 0.999),
        weight_decay=0.1,
        stat_interval=100,
        refresh_interval=1000,
    ),
)

paper = dict(
    data='ImageNet', table='4.4', model='ResNet18', optimizer='AdamR', result=dict(top1=71.29)
)
