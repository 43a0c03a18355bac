# VGG-11 without normalisation: its convolutions' weights are length times direction, and SGDPH
# takes the lengths and the biases (thesis 2.3.4).
_base_ = 'vgg11_shapes-cls.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
model = dict(backbone=dict(conv_cfg=dict(type='WeightNormConv2d'), norm_cfg=None, init_cfg=[]))
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='SGDPH', lr=0.01, momentum=0.9, weight_decay=1e-4),
)
