"""NysAct: second moments of activations, approximated by Nystroem sketches."""

from __future__ import annotations

from ..preconditioners import NystromFeature
from .families import PreconditionedSGDM


class NysAct(PreconditionedSGDM):
    """SGD with momentum on G (A + rho I)^-1, with A close to R (arXiv 2506.08360).

    Arguments are those of `PreconditionedSGDM`, settings those of `NystromFeature`.
    """

    preconditioner = NystromFeature
