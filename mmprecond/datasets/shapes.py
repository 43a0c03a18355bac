"""Deterministic synthetic images of circles, squares, triangles and stars.

``make_shapes`` writes a detection and instance segmentation set in COCO format.
``make_shape_folders`` writes a classification set with one folder per class. Only the shape depends
on the class; colours, sizes, angles and backgrounds are independent of it.
"""

from __future__ import annotations

import os
from pathlib import Path

from .render import CLASSES, RENDER_VERSION, render_image, render_single
from .writer import SetFamily, make_stamp, write_coco, write_folders

SHAPES = SetFamily(
    generator='mmprecond.datasets.shapes',
    maker='make_shapes',
    version=RENDER_VERSION,
    classes=CLASSES,
    supercategory='shape',
    description='synthetic shapes of mmprecond',
    licence=('Apache-2.0', 'https://spdx.org/licenses/'),
)


def make_shapes(
    out: str | os.PathLike[str],
    images: int = 400,
    size: int = 160,
    seed: int = 0,
    split: str = 'train',
    progress: bool = True,
    overwrite: bool = False,
) -> Path:
    """Writes a detection and instance segmentation set in COCO format.

    Makes ``out/<split>/000000.png ...`` and ``out/annotations/<split>.json``. Boxes, areas and
    polygons are those of the whole shape clipped to the image, including hidden parts. Image k
    depends only on ``(seed, split, size, k)``, not on the number of images.

    ``out/<split>.meta.json`` holds the arguments. A complete set with the same arguments is reused;
    an interrupted set is made again.

    Args:
        out: The data root, created if it is missing.
        images: Number of images, >= 1.
        size: Height and width of each image in pixels, >= 32.
        seed: 0 <= seed < 2**32.
        split: Name of the image folder and the annotation file, such as 'train' or 'val'.
        progress: Whether to show a progress bar on stderr (if tqdm is installed).
        overwrite: Whether to replace a complete set that was made with other arguments.

    Returns:
        ``out`` as a path.

    Raises:
        ValueError: An argument is out of range, a file has the path of a folder, or the folder
            holds another set or files of other origin.
        ImportError: Pillow is missing.
    """
    stamp = make_stamp(SHAPES, 'coco', images, size, seed, split)
    return write_coco(SHAPES, Path(out), stamp, render_image, progress, overwrite)


def make_shape_folders(
    out: str | os.PathLike[str],
    images: int = 400,
    size: int = 32,
    seed: int = 0,
    split: str = 'train',
    progress: bool = True,
    overwrite: bool = False,
) -> Path:
    """Writes a classification set with one shape per image and one folder per class.

    Makes ``out/<split>/<class>/000000.png ...``. The classes alternate, so their counts differ by
    at most one. Readers of this layout number the classes by sorted folder name (circle, square,
    star, triangle), which is not the order of ``CLASSES``. Existing sets, the returned path and the
    errors are as for ``make_shapes``.

    Args:
        out: The data root, created if it is missing.
        images: Total number of images of all classes, >= 4.
        size: Height and width of each image in pixels, >= 32.
        seed: 0 <= seed < 2**32.
        split: Name of the folder under ``out``.
        progress: Whether to show a progress bar.
        overwrite: Whether to replace another complete set.
    """
    stamp = make_stamp(SHAPES, 'folders', images, size, seed, split, (len(CLASSES), 10**6))
    return write_folders(
        SHAPES,
        Path(out),
        stamp,
        lambda rng, size, index: render_single(rng, size, index % len(CLASSES)),
        progress,
        overwrite,
    )
