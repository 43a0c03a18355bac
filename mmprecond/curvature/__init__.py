"""What is measured: layers, capture, running statistics. Needs torch alone."""

from .attention import AttentionLayer, softmax_gram
from .attention_types import ATTENTION_TYPES, PackedAttention, TokenAttention, WindowAttention
from .capture import Capture, Staged
from .conv import Conv2dLayer
from .layer_types import LAYER_TYPES, layer_type, qualified_name
from .layers import (
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
from .selection import LeftOut, find_layers, unwrap
from .statistics import RunningAverage

__all__ = ['ATTENTION_TYPES', 'BLOCKS', 'COLUMNS', 'LAYER_TYPES', 'MEAN', 'MOMENT', 'REDUCED',
           'SAMPLED', 'SKETCH', 'SKETCH_KINDS', 'SQUARE', 'AttentionLayer', 'Call', 'Capture',
           'Conv2dLayer', 'Layer', 'LeftOut', 'LinearLayer', 'PackedAttention', 'RunningAverage',
           'Staged', 'TokenAttention', 'WindowAttention', 'find_layers', 'layer_type',
           'qualified_name', 'softmax_gram', 'unwrap']
