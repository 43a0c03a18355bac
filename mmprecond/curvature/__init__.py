"""What is measured: layers, capture, running statistics. Needs torch alone."""

from .attention import AttentionLayer, softmax_gram
from .attention_types import ATTENTION_TYPES, PackedAttention, TokenAttention, WindowAttention
from .capture import Capture, Staged
from .layers import LAYER_TYPES, REDUCED, Conv2dLayer, Layer, LinearLayer, qualified_name
from .selection import LeftOut, find_layers, unwrap
from .statistics import RunningAverage

__all__ = ['ATTENTION_TYPES', 'LAYER_TYPES', 'REDUCED', 'AttentionLayer', 'Capture', 'Conv2dLayer',
           'Layer', 'LeftOut', 'LinearLayer', 'PackedAttention', 'RunningAverage', 'Staged',
           'TokenAttention', 'WindowAttention', 'find_layers', 'qualified_name', 'softmax_gram',
           'unwrap']
