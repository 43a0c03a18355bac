"""What is measured: layers, capture, running statistics. Needs torch alone."""

from .capture import Capture, Staged
from .layers import LAYER_TYPES, Conv2dLayer, Layer, LinearLayer
from .selection import LeftOut, find_layers, unwrap
from .statistics import RunningAverage

__all__ = ['LAYER_TYPES', 'Capture', 'Conv2dLayer', 'Layer', 'LeftOut', 'LinearLayer',
           'RunningAverage', 'Staged', 'find_layers', 'unwrap']
