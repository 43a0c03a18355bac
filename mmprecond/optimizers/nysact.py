"""NysAct: activations' second moments by Nystroem sketches."""

from __future__ import annotations

from ..preconditioners import NystromFeature
from .families import PreconditionedSGDM


class NysAct(PreconditionedSGDM):
    """SGD with momentum on G (A + rho I)^-1, A close to R (arXiv 2506.08360).

    Arguments as in `PreconditionedSGDM`; settings as in `NystromFeature`.
    """

    preconditioner = NystromFeature
