# VGG-11 with batch normalisation on shapes of 32 px, with SGD; data and schedule are those of the
# ResNet beside it.
_base_ = 'resnet18_shapes-cls.py'

model = dict(
    _delete_=True,
    type='ImageClassifier',
    backbone=dict(type='VGG', depth=11, norm_cfg=dict(type='BN'), norm_eval=False),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=4,
        in_channels=512,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
)
