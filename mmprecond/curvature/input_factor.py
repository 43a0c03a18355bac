"""Choice of the form of the input side of layers on patches."""

from __future__ import annotations

from .layer import Layer
from .patch_form import PatchForm
from .positions import Positions
from .separable import Separable

INPUT_FACTORS = ('patch', 'separable', 'kernel', 'auto')
#: Longest patch whose moment is about as cheap as its separable form.
SHORT_PATCH = 256


def input_form(layer: Layer, input_factor: str) -> PatchForm | None:
    """Form of a layer's input moment by one of `INPUT_FACTORS`, or None for the moment itself."""
    if input_factor == 'kernel':
        return Positions.of(layer)
    short = input_factor == 'auto' and layer.columns <= SHORT_PATCH
    return None if input_factor == 'patch' or short else Separable.of(layer)
