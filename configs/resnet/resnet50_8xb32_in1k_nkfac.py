# ResNet-50, ImageNet: NKFAC (thesis, table 3.5).
_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='NKFAC',
        settings='published',
        lr=0.05,
        momentum=0.9,
        weight_decay=2e-4,
        stat_interval=20,
        refresh_interval=200,
    ),
)

paper = dict(
    data='ImageNet', table='3.5', model='ResNet50', optimizer='NKFAC', result=dict(top1=77.07)
)
