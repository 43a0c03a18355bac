"""Files of generated data sets: stamps, folders, reuse."""

from __future__ import annotations

import importlib
import json
import os
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]

RENDER_VERSION = 1  # raised with every change of pixels or annotations, to recognise old sets
MIN_SIZE = 32  # pixels; in smaller images the shapes look alike
_GENERATOR = 'mmprecond.datasets.shapes'  # name of the generator in stamps


def make_stamp(kind: str, images: int, size: int, seed: int, split: str, least: int) -> Record:
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


def image_generator(stamp: Record, index: int) -> np.random.Generator:
    """Generator of image ``index``, independent of the number of images."""
    origin = zlib.crc32(f'{stamp["kind"]}/{stamp["split"]}'.encode())
    return np.random.default_rng((stamp['seed'], origin, index))


def prepare_folders(root: Path, stamp: Record, names: list[str], overwrite: bool) -> bool:
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
    write_json(path, {**stamp, 'complete': False})
    for stale in list(folder.rglob('[0-9]' * 6 + '.png')):
        stale.unlink()
    for place in {(folder / name).parent for name in names} | {file.parent for file in coco}:
        place.mkdir(parents=True, exist_ok=True)
    return True


def write_json(path: Path, content: Record) -> None:
    """Write atomically: a reader sees the old or the new file, never a part."""
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
    """Import an optional module, with a one-line error that names a missing package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'shapes need {package}: pip install {package} ({error})') from None
