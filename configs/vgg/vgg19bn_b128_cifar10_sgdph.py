# VGG-19 with batch normalisation, CIFAR-10: SGDPH (thesis, table 2.1).
_base_ = 'vgg19bn_b128_cifar100_sgdph.py'

model = dict(head=dict(num_classes=10))
data_preprocessor = dict(
    num_classes=10, mean=[125.307, 122.961, 113.8575], std=[51.5865, 50.847, 51.255]
)
train_dataloader = dict(dataset=dict(type='CIFAR10', data_root='data/cifar10'))
val_dataloader = dict(dataset=dict(type='CIFAR10', data_root='data/cifar10'))
test_dataloader = val_dataloader

paper = dict(
    data='CIFAR-10', table='2.1', model='VGG19', optimizer='SGDPH', result=dict(top1=93.75)
)
