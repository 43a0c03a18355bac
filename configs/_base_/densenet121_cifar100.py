# Of 128 px the stem makes maps of 32 px, with which DenseNets for CIFAR begin: they have no such
# stem, and MMPretrain's is for ImageNet.
_base_ = 'resnet50_cifar100.py'

model = dict(backbone=dict(_delete_=True, type='DenseNet', arch='121'), head=dict(in_channels=1024))

train_pipeline = [
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='Resize', scale=128),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='Resize', scale=128), dict(type='PackInputs')]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
