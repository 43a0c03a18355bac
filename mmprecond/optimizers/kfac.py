"""KFAC and SKFAC: the baselines of the thesis."""

from __future__ import annotations

from ..preconditioners import FisherKronecker
from .families import PreconditionedSGDM


class KFAC(PreconditionedSGDM):
    """SGD with momentum on L^-1 G R^-1, with exact inverses (thesis (3.4) and its baselines).

    KFAC* of the thesis is taken as ``damping_form='relative', damping=0.01,
    scaling='norm_recovery'``. Arguments are those of `PreconditionedSGDM`, settings those of
    `FisherKronecker`.
    """

    preconditioner = FisherKronecker


class SKFAC(PreconditionedSGDM):
    """KFAC from few rows of one batch (Tang et al., CVPR 2021; a baseline of the thesis).

    A refresh takes eight random positions of each sample of one batch. It computes inverses by the
    Sherman-Morrison-Woodbury identity. SKFAC* of the thesis is taken as ``damping_form='relative',
    damping=0.01, scaling='norm_recovery'``. Arguments are those of `PreconditionedSGDM`, settings
    those of `FisherKronecker`.
    """

    preconditioner = FisherKronecker
    preset = FisherKronecker.variants['SKFAC']
    published = preset
