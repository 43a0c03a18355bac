# The small Swin on handwritten digits, with a warm-up and a cosine schedule.
_base_ = '../quickstart/swin_shapes-cls.py'

data_root = 'data/digits-cls/'

model = dict(head=dict(num_classes=10))
data_preprocessor = dict(num_classes=10)

# Digits are not mirrored.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader

param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=50, T_max=950, end=1000),
]
