# VGG-19 with batch normalisation, CIFAR-100: AdamR (thesis, table 4.1).
_base_ = '../_base_/vgg19_cifar100.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='AdamR',
        settings='published',
        lr=0.001,
        betas=(0.9, 0.999),
        weight_decay=0.5,
        stat_interval=100,
        refresh_interval=1000,
    ),
)

paper = dict(
    data='CIFAR-100', table='4.1', model='VGG19', optimizer='AdamR', result=dict(top1=74.45)
)
