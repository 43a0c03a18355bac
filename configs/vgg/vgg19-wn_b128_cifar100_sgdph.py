# VGG-19 without normalisation, CIFAR-100: SGDPH on normalised weights (thesis, table 2.4).
_base_ = '../_base_/vgg19-wn_cifar100.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True, type='SGDPH', settings='published', lr=0.01, momentum=0.9, weight_decay=0.001
    ),
)

paper = dict(
    data='CIFAR-100', table='2.4', model='VGG19-noBN', optimizer='SGDPH_WN', result=dict(top1=67.93)
)
