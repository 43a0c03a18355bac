"""AFOpt and AdaAFOpt: attention modules preconditioned as a whole."""

from __future__ import annotations

from ..preconditioners import AttentionFeature
from .families import PreconditionedAdam, PreconditionedSGDM


class AFOpt(PreconditionedSGDM):
    """SGD with momentum on attention features, and G R^-1 on other layers (thesis Algorithm 7).

    Arguments as in `PreconditionedSGDM`; settings as in `AttentionFeature`
    and, but for `exponent`, `InputFeature` (intervals 50 and 500, damping 0.01).
    """

    preconditioner = AttentionFeature


class AdaAFOpt(PreconditionedAdam):
    """AdamW or Adan on attention features, and G R^-1 on other layers (thesis Algorithm 8).

    The moments are those of the direction after norm recovery, where Algorithm 8 prints the one
    before. Arguments as in `PreconditionedAdam`; settings as in `AttentionFeature`
    and, but for `exponent`, `InputFeature` (intervals 50 and 500, damping 0.01).
    """

    preconditioner = AttentionFeature
