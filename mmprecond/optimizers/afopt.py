"""AFOpt and AdaAFOpt: preconditioners for attention modules as a whole."""

from __future__ import annotations

from ..preconditioners import AttentionFeature
from .families import PreconditionedAdam, PreconditionedSGDM


class AFOpt(PreconditionedSGDM):
    """SGD with momentum on attention features, and G R^-1 on other layers (thesis Algorithm 7).

    Arguments are those of `PreconditionedSGDM`. Settings are those of `AttentionFeature` and,
    except for `exponent`, of `InputFeature` (intervals 50 and 500, damping 0.01).
    """

    preconditioner = AttentionFeature


class AdaAFOpt(PreconditionedAdam):
    """AdamW or Adan on attention features, and G R^-1 on other layers (thesis Algorithm 8).

    The moments are those of the direction after norm recovery; Algorithm 8 prints the direction
    before it. Arguments are those of `PreconditionedAdam`. Settings are those of `AttentionFeature`
    and, except for `exponent`, of `InputFeature` (intervals 50 and 500, damping 0.01).
    """

    preconditioner = AttentionFeature
