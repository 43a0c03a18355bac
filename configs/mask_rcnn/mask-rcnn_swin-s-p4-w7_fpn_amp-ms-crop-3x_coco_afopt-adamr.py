# Mask R-CNN Swin-S-FPN, 3x schedule: AFOpt on attention and AdamR elsewhere.
_base_ = 'mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(constructor='PrecondOptimWrapperConstructor', precondition='AFOpt+AdamR')
