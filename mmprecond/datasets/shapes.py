"""Deterministic synthetic images of circles, squares, triangles and stars.

``make_shapes`` writes a detection and instance segmentation set in COCO format.
``make_shape_folders`` writes a classification set with one folder per class. Only the shape depends
on the class; colours, sizes, angles and backgrounds are independent of it.
"""

from __future__ import annotations

import os
from pathlib import Path

from .render import CLASSES, render_image, render_single
from .writer import (
    Record,
    image_generator,
    make_stamp,
    need,
    prepare_folders,
    progress_bar,
    write_json,
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
    """Write a detection and instance segmentation set in COCO format.

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
    root, stamp = Path(out), make_stamp('coco', images, size, seed, split, least=1)
    pil = need('PIL.Image', 'pillow')
    names = [f'{index:06d}.png' for index in range(stamp['images'])]
    records: list[Record] = []
    if not prepare_folders(root, stamp, names, overwrite):
        return root
    for index in progress_bar(len(names), progress, split):
        pixels, shapes = render_image(image_generator(stamp, index), stamp['size'])
        pil.fromarray(pixels).save(root / split / names[index], compress_level=1)
        for shape in shapes:
            records.append({'id': len(records) + 1, 'image_id': index + 1, **shape})
    write_json(
        root / 'annotations' / f'{split}.json',
        {
            # No date: the same arguments give the same bytes.
            'info': {'description': 'synthetic shapes of mmprecond', **stamp},
            'licenses': [{'id': 1, 'name': 'Apache-2.0', 'url': 'https://spdx.org/licenses/'}],
            'categories': [
                {'id': number, 'name': name, 'supercategory': 'shape'}
                for number, name in enumerate(CLASSES, 1)
            ],
            'images': [
                {
                    'id': index + 1,
                    'file_name': name,
                    'width': stamp['size'],
                    'height': stamp['size'],
                    'license': 1,
                }
                for index, name in enumerate(names)
            ],
            'annotations': records,
        },
    )
    write_json(root / f'{split}.meta.json', {**stamp, 'complete': True})
    return root


def make_shape_folders(
    out: str | os.PathLike[str],
    images: int = 400,
    size: int = 32,
    seed: int = 0,
    split: str = 'train',
    progress: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write a classification set with one shape per image and one folder per class.

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
    root, stamp = Path(out), make_stamp('folders', images, size, seed, split, least=len(CLASSES))
    pil = need('PIL.Image', 'pillow')
    names = [
        f'{CLASSES[index % len(CLASSES)]}/{index // len(CLASSES):06d}.png'
        for index in range(stamp['images'])
    ]
    if not prepare_folders(root, stamp, names, overwrite):
        return root
    for index in progress_bar(len(names), progress, split):
        pixels = render_single(image_generator(stamp, index), stamp['size'], index % len(CLASSES))
        pil.fromarray(pixels).save(root / split / names[index], compress_level=1)
    write_json(root / f'{split}.meta.json', {**stamp, 'complete': True})
    return root
