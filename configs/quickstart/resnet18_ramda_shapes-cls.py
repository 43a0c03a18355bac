# RAMDA prunes the filters of the narrow ResNet-18 while it trains. In the last third of the run its
# momentum rises to 1, so that the filters that the dual average leaves out become exactly zero.
_base_ = 'resnet18_shapes-cls.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='RAMDA', lr=0.1, group_lasso=3e-5),
)
