# One linear layer classifies, as in the authors' code. MMPretrain's convolutions have biases before
# the normalisation, which theirs have not.
_base_ = 'resnet50_cifar100.py'

model = dict(
    backbone=dict(_delete_=True, type='VGG', depth=11, norm_cfg=dict(type='BN')),
    head=dict(in_channels=512),
)
