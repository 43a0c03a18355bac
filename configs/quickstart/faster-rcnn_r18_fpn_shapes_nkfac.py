# The quickstart's detector with NKFAC: three lines more than with SGD, and one for the classifier,
# whose statistics from the first batch age too fast with random weights and no warm-up. Low rank
# and, where the CPU can, bfloat16 products make it cheap.
_base_ = 'faster-rcnn_r18_fpn_shapes.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True,
        type='NKFAC',
        lr=0.01,
        momentum=0.9,
        weight_decay=1e-4,
        stat_interval=5,
        refresh_interval=25,
        solver='lowrank',
        matmul_precision='medium',
    ),
    paramwise_cfg=dict(custom_keys=dict(fc_cls=dict(precondition=False))),
)
