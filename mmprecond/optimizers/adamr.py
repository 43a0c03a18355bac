"""AdamR: Adam in a Kronecker eigenbasis."""

from __future__ import annotations

from ..preconditioners import EigenRotation
from .families import PreconditionedAdam


class AdamR(PreconditionedAdam):
    """AdamW or Adan on U1' G U2, turned back (thesis chapter 4, Algorithm 6).

    Steps count from 1 here: the first capture is at step `stat_interval`, the first basis at step
    `refresh_interval`, and until then it is the rule alone. Arguments as in `PreconditionedAdam`;
    settings as in `EigenRotation`.
    """

    preconditioner = EigenRotation
