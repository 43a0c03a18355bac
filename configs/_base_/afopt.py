# The thesis's AFOpt for `Preconditioned`: attention features on attention modules, G R^-1 on every
# other linear layer, and the plain rule on convolutions. Any rule.
afopt = [dict(preconditioner=dict(type='AttentionFeature', settings='published'))]
