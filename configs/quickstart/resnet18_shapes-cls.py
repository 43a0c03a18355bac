# A narrow ResNet-18 that classifies synthetic shapes of 32 px, from random weights, with SGD. It
# inherits MMPretrain's CIFAR config and changes width, data and schedule alone.
_base_ = 'mmpretrain::resnet/resnet18_8xb16_cifar10.py'

iterations = 400
data_root = 'data/shapes-cls/'

model = dict(
    backbone=dict(base_channels=16, stem_channels=16), head=dict(num_classes=4, in_channels=128)
)
data_preprocessor = dict(num_classes=4, mean=[127.5] * 3, std=[64.0] * 3, to_rgb=True)

_train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
_test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]

train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(_delete_=True, type='InfiniteSampler', shuffle=True),
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root=data_root,
        data_prefix='train',
        pipeline=_train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=100,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root=data_root,
        data_prefix='val',
        pipeline=_test_pipeline,
    ),
)
test_dataloader = val_dataloader

train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=iterations, val_interval=100)
param_scheduler = []  # a constant rate: nothing but the optimizer differs between runs
optim_wrapper = dict(optimizer=dict(lr=0.05))
default_hooks = dict(
    logger=dict(interval=10), checkpoint=dict(by_epoch=False, interval=iterations, max_keep_ckpts=1)
)
log_processor = dict(by_epoch=False, window_size=10)
randomness = dict(seed=0)
