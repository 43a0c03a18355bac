# Mask R-CNN Swin-T-FPN, 1x schedule: AFOpt on attention and NKFAC elsewhere.
_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(constructor='PrecondOptimWrapperConstructor', precondition='AFOpt+NKFAC')
