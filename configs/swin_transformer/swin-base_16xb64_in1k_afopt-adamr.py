# Swin-B, ImageNet: AFOpt on attention and AdamR elsewhere.
_base_ = 'mmpretrain::swin_transformer/swin-base_16xb64_in1k.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(constructor='PrecondOptimWrapperConstructor', precondition='AFOpt+AdamR')
