"""The embedded synthetic data sets: shapes in COCO format and in class folders."""

from __future__ import annotations

from .shapes import CLASSES, PALETTE, make_shape_folders, make_shapes, render_image

__all__ = ['CLASSES', 'PALETTE', 'make_shape_folders', 'make_shapes', 'render_image']
