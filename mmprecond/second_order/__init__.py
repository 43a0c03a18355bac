"""Second derivatives: double backward and weight normalisation."""

from .double_backward import (
    detach_gradients,
    differentiate_again,
    fill_missing,
    mean_over_ranks,
    refuse_single_backward,
)
from .weight_norm import WeightNormConv2d, is_vector, weight_norm

__all__ = [
    'WeightNormConv2d',
    'detach_gradients',
    'differentiate_again',
    'fill_missing',
    'is_vector',
    'mean_over_ranks',
    'refuse_single_backward',
    'weight_norm',
]
