# GoogLeNet, CIFAR-10: KFAC (thesis, table 3.1).
_base_ = 'googlenet_b128_cifar100_kfac.py'

model = dict(backbone=dict(num_classes=10))
data_preprocessor = dict(
    num_classes=10, mean=[125.307, 122.961, 113.8575], std=[51.5865, 50.847, 51.255]
)
train_dataloader = dict(dataset=dict(type='CIFAR10', data_root='data/cifar10'))
val_dataloader = dict(dataset=dict(type='CIFAR10', data_root='data/cifar10'))
test_dataloader = val_dataloader

paper = dict(
    data='CIFAR-10', table='3.1', model='GoogLeNet', optimizer='KFAC', result=dict(top1=95.52)
)
