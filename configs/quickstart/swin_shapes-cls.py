# A small Swin that classifies synthetic shapes of 32 px, from random weights, with AdamW. Data and
# schedule are those of the ResNet beside it; the model is MMPretrain's own with other sizes.
_base_ = 'resnet18_shapes-cls.py'

model = dict(
    _delete_=True,
    type='ImageClassifier',
    backbone=dict(
        type='SwinTransformer',
        img_size=32,
        patch_size=2,
        window_size=4,
        arch=dict(embed_dims=32, depths=[2, 2, 2], num_heads=[2, 4, 8]),
        drop_path_rate=0.0,
        out_indices=(2,),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=4,
        in_channels=128,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
)

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={'relative_position_bias_table': dict(decay_mult=0.0)},
    ),
)
