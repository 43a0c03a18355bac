"""Attention modules, read as a whole."""

from .heads import Heads, softmax_gram
from .layer import AttentionLayer
from .modules import (
    ATTENTION_TYPES,
    UNREADABLE,
    PackedAttention,
    TokenAttention,
    WindowAttention,
)
from .recognition import UNCALLED, recognise
from .sides import (
    KEY_CURVATURE,
    KEY_FEATURE_MOMENT,
    KEY_MEAN,
    OUTPUT_MOMENT,
    QUERY_CURVATURE,
    QUERY_MEAN,
    QUERY_MOMENT,
    VALUE_FEATURE_MOMENT,
    VALUE_MEAN,
    AttentionSide,
    MeanSide,
    counted_row,
    weighted_sum,
)

__all__ = [
    'ATTENTION_TYPES',
    'KEY_CURVATURE',
    'KEY_FEATURE_MOMENT',
    'KEY_MEAN',
    'OUTPUT_MOMENT',
    'QUERY_CURVATURE',
    'QUERY_MEAN',
    'QUERY_MOMENT',
    'UNCALLED',
    'UNREADABLE',
    'VALUE_FEATURE_MOMENT',
    'VALUE_MEAN',
    'AttentionLayer',
    'AttentionSide',
    'Heads',
    'MeanSide',
    'PackedAttention',
    'TokenAttention',
    'WindowAttention',
    'counted_row',
    'recognise',
    'softmax_gram',
    'weighted_sum',
]
