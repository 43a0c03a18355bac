# Mask R-CNN Swin-T-FPN, 1x schedule: AFOpt on attention and NKFAC elsewhere, under SGD at
# the rate of the 1x schedule.
_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(
    constructor='PrecondOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-4),
    precondition='AFOpt+NKFAC',
)
