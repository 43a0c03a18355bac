"""Attention modules, read as a whole."""

from .layer import AttentionLayer, Heads, softmax_gram
from .modules import (
    ATTENTION_TYPES,
    UNREADABLE,
    PackedAttention,
    TokenAttention,
    WindowAttention,
)

__all__ = ['ATTENTION_TYPES', 'UNREADABLE', 'AttentionLayer', 'Heads', 'PackedAttention',
           'TokenAttention', 'WindowAttention', 'softmax_gram']
