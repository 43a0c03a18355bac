# For `Preconditioned`: AFOpt on attention modules, NKFAC elsewhere. Any rule. Of a list of module
# types it is enough that one is there.
afopt_nkfac = [
    dict(
        match=dict(module_type=['WindowMSA', 'MultiheadAttention']),
        preconditioner=dict(type='AttentionFeature'),
    ),
    dict(preconditioner=dict(type='NewtonKronecker', stat_interval=50, refresh_interval=500)),
]
