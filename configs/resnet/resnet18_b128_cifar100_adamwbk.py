# ResNet-18, CIFAR-100: AdamWBK (thesis, table 4.1).
_base_ = '../_base_/resnet18_cifar100.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='AdamWBK',
        settings='published',
        lr=0.001,
        betas=(0.9, 0.999),
        weight_decay=0.5,
        stat_interval=200,
        refresh_interval=2000,
    ),
)

paper = dict(
    data='CIFAR-100', table='4.1', model='ResNet18', optimizer='AdamWBK', result=dict(top1=78.66)
)
