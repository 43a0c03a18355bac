"""Surgeries: one gradient from those of several losses that are in conflict."""

from .base import Surgery
from .gcond import GCond
from .gradients import SURGERIES, GradientSurgery, build_surgery
from .pcgrad import PCGrad
from .samgs import SAMGS

__all__ = [
    'SURGERIES',
    'GCond',
    'GradientSurgery',
    'PCGrad',
    'SAMGS',
    'Surgery',
    'build_surgery',
]
