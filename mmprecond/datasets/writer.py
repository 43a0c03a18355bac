"""Files of generated data sets: COCO format, class folders, stamps, reuse."""

from __future__ import annotations

import importlib
import json
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Record = dict[str, Any]

MIN_SIZE = 32  # pixels; in smaller images the objects look alike


@dataclass(frozen=True)
class SetFamily:
    """Properties that all sets of one generator share.

    Attributes:
        generator: Name of the generator in stamps.
        maker: Name of the function that users call, for messages.
        version: Raised with every change of pixels or annotations, to recognise old sets.
        classes: Class names; COCO's category ids start at 1.
        supercategory: COCO's name for all of the classes.
        description: One line about the contents.
        licence: Name of the licence and its address.
    """

    generator: str
    maker: str
    version: int
    classes: tuple[str, ...]
    supercategory: str
    description: str
    licence: tuple[str, str]


def write_coco(
    family: SetFamily,
    root: Path,
    stamp: Record,
    draw: Callable[[np.random.Generator, int], tuple[Array, list[Record]]],
    progress: bool,
    overwrite: bool,
) -> Path:
    """Writes a detection set in COCO format, unless it is there already.

    Args:
        family: The generator.
        root: The data root.
        stamp: Arguments of the set, from ``make_stamp``.
        draw: Function of a random generator and the size. It returns an image, uint8
            (size, size, 3), and COCO annotations without ids.
        progress: Whether to show a progress bar.
        overwrite: Whether to replace another complete set.

    Returns:
        The data root.
    """
    pil = need('PIL.Image', 'pillow')
    split, names = stamp['split'], [f'{index:06d}.png' for index in range(stamp['images'])]
    records: list[Record] = []
    if not prepare_folders(family, root, stamp, names, overwrite):
        return root
    for index in progress_bar(len(names), progress, split):
        pixels, annotations = draw(image_generator(stamp, index), stamp['size'])
        pil.fromarray(pixels).save(root / split / names[index], compress_level=1)
        for annotation in annotations:
            records.append({'id': len(records) + 1, 'image_id': index + 1, **annotation})
    write_json(root / 'annotations' / f'{split}.json', _coco_content(family, stamp, names, records))
    write_json(root / f'{split}.meta.json', {**stamp, 'complete': True})
    return root


def _coco_content(
    family: SetFamily, stamp: Record, names: list[str], annotations: list[Record]
) -> Record:
    """Content of an annotation file."""
    licence, url = family.licence
    return {
        # No date: the same arguments give the same bytes.
        'info': {'description': family.description, **stamp},
        'licenses': [{'id': 1, 'name': licence, 'url': url}],
        'categories': [
            {'id': number, 'name': name, 'supercategory': family.supercategory}
            for number, name in enumerate(family.classes, 1)
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
        'annotations': annotations,
    }


def write_folders(
    family: SetFamily,
    root: Path,
    stamp: Record,
    draw: Callable[[np.random.Generator, int, int], Array],
    progress: bool,
    overwrite: bool,
) -> Path:
    """Writes a classification set with one folder per class, unless it is there already.

    Image k is of class ``k % len(classes)``.

    Args:
        family: The generator.
        root: The data root.
        stamp: Arguments of the set, from ``make_stamp``.
        draw: Function of a random generator, the size and k. It returns an image, uint8
            (size, size, 3).
        progress: Whether to show a progress bar.
        overwrite: Whether to replace another complete set.

    Returns:
        The data root.
    """
    pil = need('PIL.Image', 'pillow')
    split, classes = stamp['split'], family.classes
    names = [
        f'{classes[index % len(classes)]}/{index // len(classes):06d}.png'
        for index in range(stamp['images'])
    ]
    if not prepare_folders(family, root, stamp, names, overwrite):
        return root
    for index in progress_bar(len(names), progress, split):
        pixels = draw(image_generator(stamp, index), stamp['size'], index)
        pil.fromarray(pixels).save(root / split / names[index], compress_level=1)
    write_json(root / f'{split}.meta.json', {**stamp, 'complete': True})
    return root


def make_stamp(
    family: SetFamily,
    kind: str,
    images: int,
    size: int,
    seed: int,
    split: str,
    limits: tuple[int, int] = (1, 10**6),
) -> Record:
    """Checks the arguments and returns them as the record that identifies a set.

    Args:
        family: The generator.
        kind: 'coco' or 'folders'.
        images: Number of images, within ``limits``.
        size: Height and width of each image in pixels.
        seed: 0 <= seed < 2**32.
        split: Name of the image folder.
        limits: Least and greatest number of images.

    Raises:
        ValueError: An argument is out of range.
    """
    stamp: Record = {
        'generator': family.generator,
        'version': family.version,
        'kind': kind,
        'split': split,
    }
    for name, value, low, high in (
        ('images', images, *limits),
        ('size', size, MIN_SIZE, 8192),
        ('seed', seed, 0, 2**32 - 1),
    ):
        if not isinstance(value, (int, np.integer)) or not low <= value <= high:
            raise ValueError(f'{name}={value!r}: write a whole number from {low} to {high}')
        stamp[name] = int(value)
    if split == 'annotations' or not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9_-]*', split):
        raise ValueError(f"split={split!r} cannot name a folder here: write a word such as 'train'")
    return stamp


def image_generator(stamp: Record, index: int) -> np.random.Generator:
    """Generator of image ``index``, independent of the number of images."""
    origin = zlib.crc32(f'{stamp["kind"]}/{stamp["split"]}'.encode())
    return np.random.default_rng((stamp['seed'], origin, index))


def prepare_folders(
    family: SetFamily, root: Path, stamp: Record, names: list[str], overwrite: bool
) -> bool:
    """Prepares the folders; False if the set is already there and complete."""
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
            existing.get('generator') == family.generator,
        )
    except (ValueError, AttributeError, TypeError, OSError):
        existing, complete, is_generated = {}, False, False
    # What other hands made is never replaced, whatever overwrite says.
    taken = [place for place in (path, *coco) if place.exists()]
    taken += list(folder.iterdir())[:1] if folder.is_dir() else []
    if taken and not is_generated:
        raise ValueError(
            f'{taken[0]} was not written by {family.maker}: write another folder as out'
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
    write_json(path, {**stamp, 'complete': False})
    for stale in list(folder.rglob('[0-9]' * 6 + '.png')):
        stale.unlink()
    for place in {(folder / name).parent for name in names} | {file.parent for file in coco}:
        place.mkdir(parents=True, exist_ok=True)
    return True


def write_json(path: Path, content: Record) -> None:
    """Writes atomically: a reader sees the old or the new file, never a part."""
    part = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        part.write_text(json.dumps(content, separators=(',', ':')) + '\n', 'utf-8')
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def progress_bar(count: int, progress: bool, title: str) -> Any:
    """``range(count)`` with a progress bar, or without one if tqdm is missing."""
    try:
        tqdm = importlib.import_module('tqdm').tqdm
    except ImportError:
        return range(count)
    return tqdm(range(count), desc=title, unit='image', disable=not progress)


def need(module: str, package: str) -> Any:
    """Imports an optional module, with a one-line error that names a missing package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'this data set needs {package}: pip install {package} ({error})'
        ) from None
