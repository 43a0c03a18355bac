# Swin-T, ImageNet: AdaNKFAC (thesis, table 3.6).
_base_ = 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='AdaNKFAC',
        settings='published',
        lr=0.002,
        betas=(0.9, 0.999),
        weight_decay=0.025,
        stat_interval=100,
        refresh_interval=1000,
    ),
)

paper = dict(
    data='ImageNet', table='3.6', model='Swin-T', optimizer='AdaNKFAC', result=dict(top1=81.63)
)
