# ResNet-50, CIFAR-100: SGDPH (thesis, table 2.1).
_base_ = '../_base_/resnet50_cifar100.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True, type='SGDPH', settings='published', lr=0.01, momentum=0.9, weight_decay=0.005
    ),
)

paper = dict(
    data='CIFAR-100', table='2.1', model='ResNet50', optimizer='SGDPH', result=dict(top1=79.54)
)
