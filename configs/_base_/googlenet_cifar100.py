# torchvision's GoogLeNet, whose last layer classifies: the neck makes the tuple that heads take. Of
# 256 px the stem makes maps of 32 px, with which a GoogLeNet for CIFAR begins.
_base_ = 'resnet50_cifar100.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='torchvision.models.GoogLeNet',
        num_classes=100,
        aux_logits=False,
        init_weights=False,
        dropout=0.0,
    ),
    neck=dict(_delete_=True, type='torch.nn.Unflatten', dim=0, unflattened_size=(1, -1)),
    head=dict(_delete_=True, type='ClsHead'),
)

train_pipeline = [
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='Resize', scale=256),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='Resize', scale=256), dict(type='PackInputs')]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
