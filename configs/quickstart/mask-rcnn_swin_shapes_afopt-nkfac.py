# The quickstart's transformer with AFOpt on attention and NKFAC elsewhere, under AdamW. Low rank,
# separable moments of convolutions and samples of rows make it cheap.
_base_ = 'mask-rcnn_swin_shapes.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
_cheap = dict(
    stat_interval=5, refresh_interval=25, solver='lowrank', input_factor='auto', max_rows=512
)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='Preconditioned',
        rule=dict(type='AdamW', lr=5e-4, weight_decay=0.05),
        layers=[
            dict(
                match=dict(module_type='WindowMSA'),
                preconditioner=dict(type='AttentionFeature', **_cheap),
            ),
            dict(preconditioner=dict(type='NewtonKronecker', **_cheap)),
        ],
    ),
)
