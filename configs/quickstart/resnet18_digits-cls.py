# The narrow ResNet-18 on handwritten digits, which tools/make_digits.py --classification writes.
# Digits are not mirrored; all else is as on shapes.
_base_ = 'resnet18_shapes-cls.py'

data_root = 'data/digits-cls/'

model = dict(head=dict(num_classes=10))
data_preprocessor = dict(num_classes=10)

_train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='PackInputs'),
]

train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=_train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
