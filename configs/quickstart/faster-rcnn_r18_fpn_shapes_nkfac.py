# The quickstart's detector with NKFAC in place of SGD.
_base_ = 'faster-rcnn_r18_fpn_shapes.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='NKFAC', lr=0.01, momentum=0.9, weight_decay=1e-4),
)
