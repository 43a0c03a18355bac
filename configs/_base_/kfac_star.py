# KFAC* and SKFAC* of the thesis: the baselines with NKFAC's damping, norm recovery and rates, for
# optim_wrapper=dict(constructor='PrecondOptimWrapperConstructor', optimizer={{_base_.kfac_star}}).
_star = dict(damping_form='relative', damping=0.01, scaling='norm_recovery',
             lr=0.05, momentum=0.9, weight_decay=0.001, stat_interval=20, refresh_interval=200)
kfac_star = dict(type='KFAC', **_star)
skfac_star = dict(type='SKFAC', **_star)
