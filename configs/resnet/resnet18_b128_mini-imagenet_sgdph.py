# ResNet-18, Mini-ImageNet: SGDPH (thesis, table 2.2).
_base_ = '../_base_/resnet18_mini-imagenet.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True, type='SGDPH', settings='published', lr=0.05, momentum=0.9, weight_decay=0.001
    ),
)

paper = dict(
    data='Mini-ImageNet', table='2.2', model='ResNet18', optimizer='SGDPH', result=dict(top1=70.53)
)
