# ResNet-18, ImageNet: SGDPH (thesis, table 2.3).
_base_ = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True, type='SGDPH', settings='published', lr=0.1, momentum=0.9, weight_decay=1e-4
    ),
)

paper = dict(
    data='ImageNet', table='2.3', model='ResNet18', optimizer='SGDPH', result=dict(top1=70.59)
)
