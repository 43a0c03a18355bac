"""Deterministic synthetic images of circles, squares, triangles and stars.

``make_shapes`` writes a detection and instance segmentation set in COCO format.
``make_shape_folders`` writes a classification set with one folder per class. Only the shape depends
on the class; colours, sizes, angles and backgrounds are independent of it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from .render import CLASSES, RENDER_VERSION, Record, need, render_image, render_single

MIN_SIZE = 32  # pixels; in smaller images the shapes look alike
_GENERATOR = 'mmprecond.datasets.shapes'  # name of the generator in stamps


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
    root, stamp = Path(out), _stamp('coco', images, size, seed, split, least=1)
    pil = need('PIL.Image', 'pillow')
    names = [f'{index:06d}.png' for index in range(stamp['images'])]
    records: list[Record] = []
    if not _prepare_folders(root, stamp, names, overwrite):
        return root
    for index in _progress_bar(len(names), progress, split):
        pixels, shapes = render_image(_generator(stamp, index), stamp['size'])
        pil.fromarray(pixels).save(root / split / names[index], compress_level=1)
        for shape in shapes:
            records.append({'id': len(records) + 1, 'image_id': index + 1, **shape})
    _write_json(
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
    _write_json(root / f'{split}.meta.json', {**stamp, 'complete': True})
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
    root, stamp = Path(out), _stamp('folders', images, size, seed, split, least=len(CLASSES))
    pil = need('PIL.Image', 'pillow')
    names = [
        f'{CLASSES[index % len(CLASSES)]}/{index // len(CLASSES):06d}.png'
        for index in range(stamp['images'])
    ]
    if not _prepare_folders(root, stamp, names, overwrite):
        return root
    for index in _progress_bar(len(names), progress, split):
        pixels = render_single(_generator(stamp, index), stamp['size'], index % len(CLASSES))
        pil.fromarray(pixels).save(root / split / names[index], compress_level=1)
    _write_json(root / f'{split}.meta.json', {**stamp, 'complete': True})
    return root


def _stamp(kind: str, images: int, size: int, seed: int, split: str, least: int) -> Record:
    """Check the arguments and return them as the record that identifies a set."""
    stamp: Record = {
        'generator': _GENERATOR,
        'version': RENDER_VERSION,
        'kind': kind,
        'split': split,
    }
    for name, value, low, high in (
        ('images', images, least, 10**6),
        ('size', size, MIN_SIZE, 8192),
        ('seed', seed, 0, 2**32 - 1),
    ):
        if not isinstance(value, (int, np.integer)) or not low <= value <= high:
            raise ValueError(f'{name}={value!r}: write a whole number from {low} to {high}')
        stamp[name] = int(value)
    if split == 'annotations' or not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9_-]*', split):
        raise ValueError(f"split={split!r} cannot name a folder here: write a word such as 'train'")
    return stamp


def _generator(stamp: Record, index: int) -> np.random.Generator:
    """Generator of image ``index``, independent of the number of images."""
    origin = zlib.crc32(f'{stamp["kind"]}/{stamp["split"]}'.encode())
    return np.random.default_rng((stamp['seed'], origin, index))


def _prepare_folders(root: Path, stamp: Record, names: list[str], overwrite: bool) -> bool:
    """Prepare the folders; False if the set is already there and complete."""
    folder, path = root / stamp['split'], root / f'{stamp["split"]}.meta.json'
    labels = root / 'annotations' / f'{stamp["split"]}.json'
    coco = [labels] if stamp['kind'] == 'coco' else []
    for place in (folder, *folder.parents, *(file.parent for file in coco)):
        if place.exists() and not place.is_dir():
            raise ValueError(f'{place} is a file: write the path of a folder as out')
    try:
        existing = json.loads(path.read_text('utf-8')) if path.exists() else {}
        complete, is_generated = (
            existing.pop('complete', False),
            existing.get('generator') == _GENERATOR,
        )
    except (ValueError, AttributeError, TypeError, OSError):
        existing, complete, is_generated = {}, False, False
    # What other hands made is never replaced, whatever overwrite says.
    taken = [place for place in (path, *coco) if place.exists()]
    taken += list(folder.iterdir())[:1] if folder.is_dir() else []
    if taken and not is_generated:
        raise ValueError(
            f'{taken[0]} was not written by make_shapes: write another folder as out'
            ' or another split'
        )
    if complete and existing != stamp and not overwrite:
        made = ', '.join(f'{key}={existing.get(key)}' for key in stamp if key != 'generator')
        raise ValueError(
            f'{folder} holds another set ({made}): write another folder as out, or'
            ' overwrite=True (--overwrite) to replace it'
        )
    if (
        complete
        and existing == stamp
        and all(place.exists() for place in (*coco, *(folder / name for name in names)))
    ):
        return False
    if existing.get('kind') == 'coco':
        labels.unlink(missing_ok=True)
    root.mkdir(parents=True, exist_ok=True)
    _write_json(path, {**stamp, 'complete': False})
    for stale in list(folder.rglob('[0-9]' * 6 + '.png')):
        stale.unlink()
    for place in {(folder / name).parent for name in names} | {file.parent for file in coco}:
        place.mkdir(parents=True, exist_ok=True)
    return True


def _write_json(path: Path, content: Record) -> None:
    """Write atomically: a reader sees the old or the new file, never a part."""
    part = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        part.write_text(json.dumps(content, separators=(',', ':')) + '\n', 'utf-8')
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _progress_bar(count: int, progress: bool, title: str) -> Any:
    """``range(count)`` with a progress bar, or without one if tqdm is missing."""
    try:
        tqdm = importlib.import_module('tqdm').tqdm
    except ImportError:
        return range(count)
    return tqdm(range(count), desc=title, unit='image', disable=not progress)
