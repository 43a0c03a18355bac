"""Gradient surgery: one gradient from those of several losses in conflict."""

from .base import Aggregator
from .gcond import GCond
from .gradients import AGGREGATORS, GradientSurgery, build_aggregator
from .pcgrad import PCGrad
from .samgs import SAMGS

__all__ = [
    'AGGREGATORS',
    'GCond',
    'GradientSurgery',
    'PCGrad',
    'SAMGS',
    'Aggregator',
    'build_aggregator',
]
