"""Synthetic data sets of shapes, in COCO format and in class folders."""

from __future__ import annotations

from .render import CLASSES, PALETTE, render_image
from .shapes import make_shape_folders, make_shapes

__all__ = ['CLASSES', 'PALETTE', 'make_shape_folders', 'make_shapes', 'render_image']
