# GoogLeNet, CIFAR-100: NKFAC (thesis, table 3.1).
_base_ = '../_base_/googlenet_cifar100.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
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

paper = dict(
    data='CIFAR-100', table='3.1', model='GoogLeNet', optimizer='NKFAC', result=dict(top1=81.65)
)
