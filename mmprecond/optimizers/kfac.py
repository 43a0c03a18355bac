"""KFAC: the baseline of the thesis."""

from __future__ import annotations

from ..preconditioners import FisherKronecker
from .families import PreconditionedSGDM


class KFAC(PreconditionedSGDM):
    """SGD with momentum on L^-1 G R^-1, exact inverses (thesis (3.4) and its baselines).

    KFAC* of the thesis is ``damping_form='relative', damping=0.01, scaling='norm_recovery'``.
    Arguments as in `PreconditionedSGDM`; settings as in `FisherKronecker`.
    """

    preconditioner = FisherKronecker
