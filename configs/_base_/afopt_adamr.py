# For `Preconditioned`: AFOpt on attention modules, AdamR elsewhere. Under AdamW or Adan.
afopt_adamr = [
    dict(
        match=dict(module_type=['WindowMSA', 'MultiheadAttention']),
        preconditioner=dict(type='AttentionFeature'),
    ),
    dict(preconditioner=dict(type='EigenRotation')),
]
