"""AdamR: Adam in a Kronecker eigenbasis."""

from __future__ import annotations

from ..preconditioners import EigenRotation
from .families import PreconditionedAdam


class AdamR(PreconditionedAdam):
    """An adaptive rule on U1' G U2, with the update rotated back (thesis chapter 4, Algorithm 6).

    Steps count from 1: without `early_refreshes`, the first capture is at step `stat_interval`, the
    first basis at step `refresh_interval`. Until there is a basis the rule takes plain gradients.
    Arguments are those of
    `PreconditionedAdam`, settings those of `EigenRotation`.
    """

    preconditioner = EigenRotation
