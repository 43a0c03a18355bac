"""Layers, their statistics, and capture. The subpackage needs only torch."""

from .attention import (
    AttentionLayer,
    PackedAttention,
    TokenAttention,
    WindowAttention,
    softmax_gram,
)
from .average import RunningAverage
from .calls import Call
from .capture import Capture
from .conv import Conv2dLayer
from .eager import Eager
from .form import Factor, Form, Power
from .gradient_matrix import (
    MatrixLayer,
    find_matrices,
    matrix_dims,
    matrix_flops,
    measure_matrix,
)
from .input_factor import INPUT_FACTORS, input_form
from .layer import Layer
from .linear import LinearLayer
from .moments import SKETCH_KINDS, Blocks, Columns, Moment, Sketch
from .patch_form import PatchForm
from .positions import Positions
from .registry import (
    ATTENTION_TYPES,
    LAYER_TYPES,
    AttentionTypes,
    attention_type,
    attention_types,
    layer_type,
    qualified_name,
    register_attention,
    register_layer,
    unread_attention,
)
from .selection import AttentionReading, LeftOut, find_layers, unwrap, unwrap_measured
from .separable import Separable
from .staging import Staged
from .statistic import (
    ALL,
    GRADIENT,
    INPUT,
    MATRIX,
    REDUCED,
    WEIGHT,
    Rows,
    SampledRows,
    Side,
    Statistic,
)
from .vectors import CountedMean, Mean, Square

__all__ = [
    'ALL',
    'ATTENTION_TYPES',
    'AttentionLayer',
    'AttentionReading',
    'Blocks',
    'Call',
    'Capture',
    'Eager',
    'Columns',
    'Conv2dLayer',
    'CountedMean',
    'Factor',
    'Form',
    'GRADIENT',
    'INPUT',
    'INPUT_FACTORS',
    'LAYER_TYPES',
    'Layer',
    'LeftOut',
    'LinearLayer',
    'MatrixLayer',
    'Mean',
    'MATRIX',
    'Moment',
    'PackedAttention',
    'PatchForm',
    'Positions',
    'Power',
    'REDUCED',
    'Rows',
    'RunningAverage',
    'SKETCH_KINDS',
    'SampledRows',
    'Separable',
    'Side',
    'Sketch',
    'Square',
    'Staged',
    'Statistic',
    'TokenAttention',
    'WEIGHT',
    'WindowAttention',
    'AttentionTypes',
    'attention_type',
    'attention_types',
    'find_layers',
    'find_matrices',
    'matrix_dims',
    'input_form',
    'layer_type',
    'matrix_flops',
    'measure_matrix',
    'qualified_name',
    'register_attention',
    'register_layer',
    'softmax_gram',
    'unread_attention',
    'unwrap',
    'unwrap_measured',
]
