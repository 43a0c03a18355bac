"""The owner of curvature: layers, stacks, schedules, checkpoints and reports."""

from .stack import LayerStack, RefreshError

__all__ = ['LayerStack', 'RefreshError']
