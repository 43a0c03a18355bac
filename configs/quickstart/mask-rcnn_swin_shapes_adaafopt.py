# The quickstart's transformer with AdaAFOpt on all layers.
_base_ = 'mask-rcnn_swin_shapes.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='AdaAFOpt',
        lr=5e-4,
        weight_decay=0.05,
    ),
)
