# ResNet-18, CIFAR-10: NKFAC with the settings of CIFAR-100 (thesis, chapter 3).
_base_ = 'mmpretrain::resnet/resnet18_8xb16_cifar10.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
train_dataloader = dict(batch_size=128)
param_scheduler = dict(_delete_=True, type='CosineAnnealingLR', T_max=200, eta_min_ratio=1e-3)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='NKFAC',
        settings='published',
        lr=0.05,
        momentum=0.9,
        weight_decay=0.001,
        stat_interval=20,
        refresh_interval=200,
    ),
)

paper = dict(data='CIFAR-10', chapter=3, model='ResNet18', optimizer='NKFAC')
