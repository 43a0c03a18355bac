# VGG-11 with batch normalisation, CIFAR-100: SGDPH (thesis, table 2.1).
_base_ = '../_base_/vgg11_cifar100.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True, type='SGDPH', settings='published', lr=0.01, momentum=0.9, weight_decay=0.005
    ),
)

paper = dict(
    data='CIFAR-100', table='2.1', model='VGG11', optimizer='SGDPH', result=dict(top1=72.75)
)
