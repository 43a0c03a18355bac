# Swin-T, ImageNet: AFOpt on attention and NKFAC elsewhere.
_base_ = 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'

custom_imports = dict(imports=['mmprecond'], allow_failed_imports=False)
optim_wrapper = dict(constructor='PrecondOptimWrapperConstructor', precondition='AFOpt+NKFAC')
