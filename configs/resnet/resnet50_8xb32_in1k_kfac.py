# ResNet-50, ImageNet: KFAC (thesis, table 3.5).
_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='KFAC',
        settings='published',
        lr=5e-4,
        momentum=0.9,
        weight_decay=0.02,
        stat_interval=20,
        refresh_interval=200,
    ),
)

paper = dict(
    data='ImageNet', table='3.5', model='ResNet50', optimizer='KFAC', result=dict(top1=76.66)
)
