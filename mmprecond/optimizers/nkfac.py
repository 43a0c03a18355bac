"""NKFAC and AdaNKFAC: Kronecker-factored curvature with Newton-iteration inverses."""

from __future__ import annotations

from ..preconditioners import NewtonKronecker
from .families import PreconditionedAdam, PreconditionedSGDM


class NKFAC(PreconditionedSGDM):
    """SGD with momentum on L^-1 G R^-1 (thesis chapter 3, Algorithm 4).

    Arguments are those of `PreconditionedSGDM`, settings those of `NewtonKronecker`.
    """

    preconditioner = NewtonKronecker


class AdaNKFAC(PreconditionedAdam):
    """AdamW on L^-1 G R^-1 (thesis Algorithm 5), by default at intervals 100 and 1000.

    Weight decay is lr / (1 - beta1^t) weight_decay p, as in the published code. Arguments are those
    of `PreconditionedAdam`, settings those of `NewtonKronecker`.
    """

    preconditioner = NewtonKronecker
    preset = dict(stat_interval=100, refresh_interval=1000)
    published = preset
    decay = 'published'
