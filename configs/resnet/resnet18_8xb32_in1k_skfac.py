# ResNet-18, ImageNet: SKFAC (thesis, table 3.5).
_base_ = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='SKFAC',
        settings='published',
        lr=5e-4,
        momentum=0.9,
        weight_decay=0.02,
        stat_interval=20,
        refresh_interval=200,
    ),
)

paper = dict(
    data='ImageNet', table='3.5', model='ResNet18', optimizer='SKFAC', result=dict(top1=10.28)
)
