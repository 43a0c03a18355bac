# VGG-19 without normalisation: its convolutions' weights are length times direction, and SGDPH
# takes the lengths and the biases (thesis 2.3.4).
_base_ = 'vgg19_cifar100.py'

model = dict(backbone=dict(conv_cfg=dict(type='WeightNormConv2d'), norm_cfg=None, init_cfg=[]))
