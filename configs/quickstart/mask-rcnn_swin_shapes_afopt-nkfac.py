# The quickstart's transformer with AFOpt on attention and NKFAC elsewhere, under AdamW.
_base_ = 'mask-rcnn_swin_shapes.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='Preconditioned',
        rule=dict(type='AdamW', lr=5e-4, weight_decay=0.05),
        layers=[
            dict(
                match=dict(module_type='WindowMSA'),
                preconditioner=dict(type='AttentionFeature'),
            ),
            dict(preconditioner=dict(type='NewtonKronecker')),
        ],
    ),
)
