# The small RetinaNet with AFOpt on attention and NKFAC elsewhere, under SGD with momentum.
_base_ = 'retinanet_swin_shapes.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='Preconditioned',
        rule=dict(type='SGDM', lr=0.01, momentum=0.9, weight_decay=1e-4),
        layers=[
            dict(
                match=dict(module_type='WindowMSA'),
                preconditioner=dict(type='AttentionFeature'),
            ),
            dict(preconditioner=dict(type='NewtonKronecker')),
        ],
    ),
)
