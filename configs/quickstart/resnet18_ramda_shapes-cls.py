# RAMDA prunes the filters of the narrow ResNet-18 while it trains. The momentum rises to 1 in the
# last third of the run, so that the filters that the dual average leaves out become exactly zero.
_base_ = 'resnet18_shapes-cls.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
iterations = 400
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='RAMDA', lr=0.01, momentum=1.0, sparsity=1e-3),
)
_last = 2 * iterations // 3
param_scheduler = [
    dict(type='ConstantMomentum', factor=0.1, by_epoch=False, begin=0, end=_last),
    dict(type='LinearMomentum', start_factor=0.1, by_epoch=False, begin=_last, end=iterations),
]
