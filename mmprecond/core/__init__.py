"""Curvature of a model: layers, stacks, schedules, checkpoints and reports."""

from ..preconditioners import RefreshError
from .assignment import Assignment, parse_layers, split_words
from .basis import rotate
from .curvature import Curvature
from .directions import frozen_parts
from .monitor import Monitor, RefreshReport
from .options import CurvatureOptions
from .stack import LayerStack

__all__ = [
    'Assignment',
    'Curvature',
    'CurvatureOptions',
    'LayerStack',
    'Monitor',
    'RefreshError',
    'RefreshReport',
    'frozen_parts',
    'parse_layers',
    'rotate',
    'split_words',
]
