# The thesis's settings by data set and optimizer: beside the config of a toolbox in _base_, for
#     optim_wrapper = dict(constructor='PrecondOptimWrapperConstructor',
#                          optimizer={{_base_.coco_nkfac}})
# They replace the toolbox's optimizer as a whole, and start from the literal settings of each
# method's source, whatever our defaults are.
# COCO rates are for a batch of 16, those of CIFAR for 128, of ImageNet for 256 (Swin: 1024). Where
# it names no intervals for a method on a data set, they are the method's defaults.
__anew = dict(_delete_=True, settings='published')
__sgd = dict(__anew, lr=0.02, momentum=0.9, weight_decay=1e-4)
__retina = dict(__sgd, lr=0.01)
__adam = dict(__anew, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
__rare = dict(stat_interval=100, refresh_interval=1000)
__often = dict(stat_interval=50, refresh_interval=500)

# Tables 3.7 and 3.9 (Faster and Mask R-CNN, R50 and R101), 3.8 and 5.1 (RetinaNet Swin-T).
coco_nkfac = dict(type='NKFAC', **__sgd, **__rare)
coco_nkfac_retinanet = dict(type='NKFAC', **__retina, **__rare)
coco_fsgd_retinanet = dict(type='FSGD', **__retina, **__often)
coco_afopt_retinanet = dict(type='AFOpt', **__retina, **__often)
# Tables 3.9, 4.6 and 5.2 (Mask R-CNN Swin-T), 4.5 and 4.6 (Faster and Mask R-CNN, R50 and R101).
coco_adankfac = dict(__adam, type='AdaNKFAC', weight_decay=0.2, **__rare)
coco_adamr = dict(__adam, type='AdamR', weight_decay=0.02, **__rare)
coco_adamr_resnet = dict(__adam, type='AdamR', weight_decay=0.2, **__rare)
coco_fadam = dict(__adam, type='FAdam', **__often)
coco_adaafopt = dict(__adam, type='AdaAFOpt', **__often)

# CIFAR-100, chapters 2 to 4.
cifar_sgdph = dict(__anew, type='SGDPH', lr=0.01, momentum=0.9, weight_decay=0.005)
cifar_nkfac = dict(
    __anew,
    type='NKFAC',
    lr=0.05,
    momentum=0.9,
    weight_decay=0.001,
    stat_interval=20,
    refresh_interval=200,
)
cifar_kfac = dict(
    __anew,
    type='KFAC',
    lr=5e-4,
    momentum=0.9,
    weight_decay=0.1,
    stat_interval=20,
    refresh_interval=200,
)
cifar_skfac = dict(cifar_kfac, type='SKFAC')
# KFAC* and SKFAC*: with NKFAC's damping, norm recovery and rates.
__star = dict(
    damping_form='relative', damping=0.01, scaling='norm_recovery', lr=0.05, weight_decay=0.001
)
cifar_kfac_star = dict(cifar_kfac, **__star)
cifar_skfac_star = dict(cifar_skfac, **__star)
cifar_sgdmbk = dict(__anew, type='SGDMBK', lr=0.05, momentum=0.9, weight_decay=0.001)
cifar_adamwbk = dict(__anew, type='AdamWBK', lr=0.001, weight_decay=0.5)
cifar_adamr = dict(__anew, type='AdamR', lr=0.001, weight_decay=0.5, **__rare)

# ImageNet, chapters 2 to 4.
imagenet_sgdph = dict(__anew, type='SGDPH', lr=0.1, momentum=0.9, weight_decay=1e-4)
imagenet_nkfac = dict(__anew, type='NKFAC', lr=0.05, momentum=0.9, weight_decay=2e-4)
imagenet_kfac = dict(__anew, type='KFAC', lr=5e-4, momentum=0.9, weight_decay=0.02)
imagenet_adankfac_swin = dict(__anew, type='AdaNKFAC', lr=0.002, weight_decay=0.025)
