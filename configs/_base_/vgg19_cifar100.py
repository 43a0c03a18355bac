_base_ = 'vgg11_cifar100.py'

model = dict(backbone=dict(depth=19))
