"""FSGD and FAdam: gradient descent in feature space."""

from __future__ import annotations

from ..preconditioners import InputFeature
from .families import PreconditionedAdam, PreconditionedSGDM


class FSGD(PreconditionedSGDM):
    """SGD with momentum on G R^-1 (thesis 5.2.2), by default at intervals 50 and 500.

    ``exponent=0.5`` gives feature whitening (EFW). Arguments are those of `PreconditionedSGDM`,
    settings those of `InputFeature`.
    """

    preconditioner = InputFeature


class FAdam(PreconditionedAdam):
    """AdamW on G R^-1 (thesis 5.3.4), with decoupled weight decay.

    Arguments are those of `PreconditionedAdam`, settings those of `InputFeature`.
    """

    preconditioner = InputFeature
