"""Generated data sets, in COCO format and in class folders: shapes, and handwritten digits."""

from __future__ import annotations

from .digits import DIGIT_CLASSES, make_digit_folders, make_digits
from .render import CLASSES, PALETTE, render_image
from .shapes import make_shape_folders, make_shapes

__all__ = [
    'CLASSES',
    'DIGIT_CLASSES',
    'PALETTE',
    'make_digit_folders',
    'make_digits',
    'make_shape_folders',
    'make_shapes',
    'render_image',
]
