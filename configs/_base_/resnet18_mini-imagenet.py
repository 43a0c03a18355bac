# Mini-ImageNet: 100 classes in folders, 500 images of each in train/, 100 in val/. The thesis names
# neither the size nor the stem: 84 px is the data set's usual size, the stem is ImageNet's.
_base_ = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'

model = dict(head=dict(num_classes=100))
data_preprocessor = dict(num_classes=100)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=84),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=96, edge='short'),
    dict(type='CenterCrop', crop_size=84),
    dict(type='PackInputs'),
]
dataset_type = 'CustomDataset'
train_dataloader = dict(
    batch_size=128,
    dataset=dict(
        _delete_=True,
        type=dataset_type,
        data_root='data/mini-imagenet',
        data_prefix='train',
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=128,
    dataset=dict(
        _delete_=True,
        type=dataset_type,
        data_root='data/mini-imagenet',
        data_prefix='val',
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
auto_scale_lr = dict(base_batch_size=128)
