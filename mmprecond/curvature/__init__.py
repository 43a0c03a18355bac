"""What is measured: layers, capture, running statistics. Needs torch alone."""

from .attention import (
    ATTENTION_TYPES,
    AttentionLayer,
    PackedAttention,
    TokenAttention,
    WindowAttention,
    softmax_gram,
)
from .average import RunningAverage
from .capture import Capture, Staged
from .conv import Conv2dLayer
from .layer import (
    BLOCKS,
    COLUMNS,
    MEAN,
    MOMENT,
    REDUCED,
    SAMPLED,
    SKETCH,
    SKETCH_KINDS,
    SQUARE,
    Call,
    Layer,
)
from .linear import LinearLayer
from .registry import LAYER_TYPES, layer_type, qualified_name
from .selection import LeftOut, find_layers, unwrap

__all__ = ['ATTENTION_TYPES', 'BLOCKS', 'COLUMNS', 'LAYER_TYPES', 'MEAN', 'MOMENT', 'REDUCED',
           'SAMPLED', 'SKETCH', 'SKETCH_KINDS', 'SQUARE', 'AttentionLayer', 'Call', 'Capture',
           'Conv2dLayer', 'Layer', 'LeftOut', 'LinearLayer', 'PackedAttention', 'RunningAverage',
           'Staged', 'TokenAttention', 'WindowAttention', 'find_layers', 'layer_type',
           'qualified_name', 'softmax_gram', 'unwrap']
