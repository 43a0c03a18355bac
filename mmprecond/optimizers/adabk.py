"""SGDMBK and AdamWBK (AdaBK): inverse roots of Kronecker factors."""

from __future__ import annotations

from ..preconditioners import KroneckerRoot
from .families import PreconditionedAdam, PreconditionedSGDM


class SGDMBK(PreconditionedSGDM):
    """SGD with momentum on L^-1/2 G R^-1/2 (AdaBK, CVPR 2023).

    Arguments are those of `PreconditionedSGDM`, settings those of `KroneckerRoot`.
    """

    preconditioner = KroneckerRoot


class AdamWBK(PreconditionedAdam):
    """AdamW on L^-1/2 G R^-1/2 (AdaBK, CVPR 2023).

    Weight decay is lr / (1 - beta1^t) weight_decay p, as in the published code. Arguments are those
    of `PreconditionedAdam`, settings those of `KroneckerRoot`.
    """

    preconditioner = KroneckerRoot
    decay = 'published'
