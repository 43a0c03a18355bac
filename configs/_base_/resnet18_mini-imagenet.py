# Mini-ImageNet: 100 classes in folders, 500 images of each in train/, 100 in val/. Images of 84 px
# are enlarged to 224 px, as in the thesis; stem and augmentation are those of ImageNet.
_base_ = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'

model = dict(head=dict(num_classes=100))
data_preprocessor = dict(num_classes=100)

dataset_type = 'CustomDataset'
train_dataloader = dict(
    batch_size=128,
    dataset=dict(
        _delete_=True,
        type=dataset_type,
        data_root='data/mini-imagenet',
        data_prefix='train',
        pipeline={{_base_.train_pipeline}},
    ),
)
val_dataloader = dict(
    batch_size=128,
    dataset=dict(
        _delete_=True,
        type=dataset_type,
        data_root='data/mini-imagenet',
        data_prefix='val',
        pipeline={{_base_.test_pipeline}},
    ),
)
test_dataloader = val_dataloader
auto_scale_lr = dict(base_batch_size=128)
