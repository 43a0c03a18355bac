_base_ = 'resnet50_cifar100.py'

model = dict(backbone=dict(depth=18), head=dict(in_channels=512))
