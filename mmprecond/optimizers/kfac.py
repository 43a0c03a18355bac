"""KFAC and SKFAC: the baselines of the thesis."""

from __future__ import annotations

from ..preconditioners import FisherKronecker
from .families import PreconditionedSGDM


class KFAC(PreconditionedSGDM):
    """SGD with momentum on L^-1 G R^-1, exact inverses (thesis (3.4) and its baselines).

    KFAC* of the thesis is ``damping_form='relative', damping=0.01, scaling='norm_recovery'``.
    Arguments as in `PreconditionedSGDM`; settings as in `FisherKronecker`.
    """

    preconditioner = FisherKronecker


class SKFAC(PreconditionedSGDM):
    """KFAC from few rows of one batch (Tang et al., CVPR 2021; a baseline of the thesis).

    Eight random positions of each sample of the batch at a refresh, inverses by the
    Sherman-Morrison-Woodbury identity. SKFAC* of the thesis is ``damping_form='relative',
    damping=0.01, scaling='norm_recovery'``. Arguments as in `PreconditionedSGDM`; settings as in
    `FisherKronecker`.
    """

    preconditioner = FisherKronecker
    preset = dict(solver='woodbury', reduction='sample', stat_decay=0.0)
    published = preset
