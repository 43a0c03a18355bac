# The thesis's AFOpt for `Preconditioned`: attention features on attention modules, G R^-1 on every
# other linear layer and convolution. Any rule.
afopt = [dict(preconditioner=dict(type='AttentionFeature', settings='published'))]
