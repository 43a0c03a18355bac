# CIFAR-100 as in the thesis: one GPU with a batch of 128, steps as in tables 2.1 and 4.1.
_base_ = 'mmpretrain::resnet/resnet50_8xb16_cifar100.py'

train_dataloader = dict(batch_size=128)
param_scheduler = dict(milestones=[60, 120, 180], gamma=0.1)
