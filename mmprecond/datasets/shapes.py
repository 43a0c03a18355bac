"""Deterministic synthetic images of circles, squares, triangles and stars.

``make_shapes`` writes a detection and instance segmentation set in COCO format,
``make_shape_folders`` a classification set with one folder per class. A class is told by its
shape alone: colours, sizes, angles and backgrounds are drawn without regard to it.

Coordinates are continuous, as in COCO: pixel ``i`` covers ``[i, i + 1]``, x grows to the right
and y downwards.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CLASSES = ('circle', 'square', 'triangle', 'star')
PALETTE = ((220, 20, 60), (0, 114, 189), (237, 177, 32), (119, 172, 48))

RENDER_VERSION = 1  # raised with every change of pixels or annotations, to tell old sets
MIN_SIZE = 32  # pixels; below it the shapes can no longer be told apart
_MIN_DIAMETER = 6.0  # pixels; keeps every clipped box wider than 1 pixel
_MIN_VISIBLE = 0.25  # part of a shape that must stay uncovered for it to be annotated
_GRID = 16  # vertices lie on 1/16 pixel: exact in binary, so sums of box values are exact
_SUPERSAMPLE = 4
_VERTICES = {'circle': 36, 'square': 4, 'triangle': 3, 'star': 10}
_GENERATOR = 'mmprecond.datasets.shapes'  # names the maker in stamps

Array = NDArray[Any]
Points = list[tuple[float, float]]
Record = dict[str, Any]


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
    polygons are those of the whole shape clipped to the image, hidden parts included. Image k
    depends on ``(seed, split, size, k)`` only, not on the number of images.

    ``out/<split>.meta.json`` holds the arguments: a complete set with the same ones is reused
    as it is, an interrupted one is made again.

    Args:
        out: The data root; made if it is missing.
        images: Number of images, >= 1.
        size: Height and width of each image in pixels, >= 32.
        seed: 0 <= seed < 2**32.
        split: Name of the image folder and the annotation file, such as 'train' or 'val'.
        progress: Whether to show a progress bar on stderr (where tqdm is installed).
        overwrite: Whether to replace a complete set that was made with other arguments.

    Returns:
        ``out`` as a path.

    Raises:
        ValueError: An argument is out of range, a file stands where a folder must be, or the
            place holds another set or files of other origin.
        ImportError: Pillow is missing.
    """
    root, stamp = Path(out), _stamp('coco', images, size, seed, split, least=1)
    pil = _need('PIL.Image', 'pillow')
    names = [f'{index:06d}.png' for index in range(stamp['images'])]
    records: list[Record] = []
    if not _begin(root, stamp, names, overwrite):
        return root
    for index in _bar(len(names), progress, split):
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

    Makes ``out/<split>/<class>/000000.png ...``; the classes take turns, so their counts differ
    by one at most. Readers of this layout number the classes by sorted folder name (circle,
    square, star, triangle), which is not the order of ``CLASSES``. Existing sets, the returned
    path and the errors are as for ``make_shapes``.

    Args:
        out: The data root; made if it is missing.
        images: Number of images of all classes together, >= 4.
        size: Height and width of each image in pixels, >= 32.
        seed: 0 <= seed < 2**32.
        split: Name of the folder under ``out``.
        progress: Whether to show a progress bar.
        overwrite: Whether to replace another complete set.
    """
    root, stamp = Path(out), _stamp('folders', images, size, seed, split, least=len(CLASSES))
    pil = _need('PIL.Image', 'pillow')
    names = [
        f'{CLASSES[index % len(CLASSES)]}/{index // len(CLASSES):06d}.png'
        for index in range(stamp['images'])
    ]
    if not _begin(root, stamp, names, overwrite):
        return root
    for index in _bar(len(names), progress, split):
        pixels = _render_single(_generator(stamp, index), stamp['size'], index % len(CLASSES))
        pil.fromarray(pixels).save(root / split / names[index], compress_level=1)
    _write_json(root / f'{split}.meta.json', {**stamp, 'complete': True})
    return root


def render_image(rng: np.random.Generator, size: int) -> tuple[Array, list[Record]]:
    """Draw one image of 1 to 5 overlapping shapes; later shapes cover earlier ones.

    Args:
        rng: Source of all randomness.
        size: Height and width in pixels, >= 32.

    Returns:
        The image, uint8 (size, size, 3) RGB, and at least one COCO annotation without its ids:
        one per shape of which 25 % can be seen. Boxes are xywh in pixels, area in px^2.

    Raises:
        ImportError: Pillow is missing.
    """
    canvas = _background(rng, size)
    owner = np.full((size, size), -1)  # index of the topmost shape at each pixel
    drawn: list[tuple[int, Array, int]] = []
    for index in range(int(rng.integers(1, 6))):
        label = int(rng.integers(len(CLASSES)))
        # Log-uniform from 18 % to 65 % of the image: small shapes as frequent as large ones.
        diameter = max(size * 0.18 * (0.65 / 0.18) ** rng.random(), _MIN_DIAMETER)
        # At most 15 % of the diameter may stick out of the image.
        centre = rng.uniform(0.35 * diameter, size - 0.35 * diameter, 2)
        polygon = _polygon(label, centre, diameter, _angle(rng), size)
        covered = _paint(rng, canvas, polygon) >= 0.5
        owner[covered] = index
        drawn.append((label, polygon, int(covered.sum())))
    return _finish(rng, canvas), [
        _annotation(label, polygon)
        for index, (label, polygon, pixels) in enumerate(drawn)
        if np.count_nonzero(owner == index) >= _MIN_VISIBLE * pixels
    ]


def _angle(rng: np.random.Generator) -> float:
    """Roughly upright, so that a short training run can learn the classes."""
    return float(rng.uniform(-0.35, 0.35)) - math.pi / 2


def _render_single(rng: np.random.Generator, size: int, label: int) -> Array:
    """Draw one shape near the middle: uint8 (size, size, 3)."""
    canvas = _background(rng, size)
    diameter = size * rng.uniform(0.5, 0.85)
    centre = size * rng.uniform(0.42, 0.58, 2)
    _paint(rng, canvas, _polygon(label, centre, diameter, _angle(rng), size))
    return _finish(rng, canvas)


def _annotation(label: int, polygon: Array) -> Record:
    """COCO entries of one clipped polygon (n, 2)."""
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    x, y = polygon.T
    area = 0.5 * abs(float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))))
    return {
        'category_id': label + 1,
        'bbox': [*low.tolist(), *(high - low).tolist()],
        'area': area,
        'segmentation': [polygon.ravel().tolist()],
        'iscrowd': 0,
    }


def _polygon(label: int, centre: Array, diameter: float, angle: float, size: int) -> Array:
    """Outline (n, 2) clipped to the image; ``diameter`` of the circle around it, in pixels."""
    name = CLASSES[label]
    angle += math.pi / 4 if name == 'square' else 0  # stands on a side, others on their base
    points: Points = []
    for k in range(_VERTICES[name]):
        # A star alternates between an outer and an inner circle.
        radius = diameter / 2 * (0.45 if name == 'star' and k % 2 else 1.0)
        turn = angle + 2 * math.pi * k / _VERTICES[name]
        points.append((centre[0] + radius * math.cos(turn), centre[1] + radius * math.sin(turn)))
    for axis in (0, 1):
        points = _clip(_clip(points, axis, 0.0, 1.0), axis, float(size), -1.0)
    rounded = np.round(np.asarray(points) * _GRID) / _GRID + 0.0  # + 0.0: no -0.0
    return rounded[np.any(rounded != np.roll(rounded, 1, axis=0), axis=1)]


def _clip(points: Points, axis: int, bound: float, sign: float) -> Points:
    """One side of Sutherland-Hodgman clipping: keep ``sign * (p[axis] - bound) >= 0``."""
    kept: Points = []
    for before, point in zip(points[-1:] + points[:-1], points, strict=True):
        inside, outside = sign * (point[axis] - bound), sign * (before[axis] - bound)
        if (inside >= 0) != (outside >= 0):
            part = outside / (outside - inside)
            kept.append(
                (
                    before[0] + part * (point[0] - before[0]),
                    before[1] + part * (point[1] - before[1]),
                )
            )
        if inside >= 0:
            kept.append(point)
    return kept


def _coverage(polygon: Array, size: int) -> Array:
    """Share of each pixel that a clipped polygon (n, 2) covers: (size, size) in [0, 1]."""
    image, draw = _need('PIL.Image', 'pillow'), _need('PIL.ImageDraw', 'pillow')
    left, top = np.floor(polygon.min(axis=0)).astype(int)
    right, bottom = np.ceil(polygon.max(axis=0)).astype(int)
    mask = image.new('L', (int(right - left) * _SUPERSAMPLE, int(bottom - top) * _SUPERSAMPLE))
    # Pillow cuts floats to integers and counts pixel centres: shift by half, then round.
    points = np.round((polygon - (left, top)) * _SUPERSAMPLE - 0.5).astype(int)
    draw.Draw(mask).polygon([tuple(point) for point in points.tolist()], fill=255)
    result = np.zeros((size, size))
    result[top:bottom, left:right] = np.asarray(mask.reduce(_SUPERSAMPLE)) / 255.0
    return result


def _paint(rng: np.random.Generator, canvas: Array, polygon: Array) -> Array:
    """Fill a polygon on ``canvas`` in place; return its coverage (size, size)."""
    size = len(canvas)
    cover: Array = _coverage(polygon, size)[..., None]
    under = (canvas * cover).sum(axis=(0, 1)) / cover.sum()
    # Some contrast to what lies below, or the shape could not be seen at all.
    colours = rng.uniform(20, 235, (16, 3))
    distance = np.sqrt(((colours - under) ** 2).sum(axis=1))
    far = np.flatnonzero(distance >= 80)
    colour = colours[far[0] if len(far) else np.argmax(distance)]
    # A brightness slope, so that one shape has not one colour.
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    steps = (np.arange(size)[:, None] + 0.5 - (low + high) / 2) / (high - low)
    slope = rng.uniform(-45, 45, 2)
    shade = steps[:, 0] * slope[0] + steps[:, 1, None] * slope[1]
    canvas += cover * (colour + shade[..., None] - canvas)
    return cover[..., 0]


def _background(rng: np.random.Generator, size: int) -> Array:
    """Colour gradient, low-frequency noise and often stripes: float64 (size, size, 3)."""
    # Plain arithmetic alone: the rounding of np.sin or BLAS depends on the processor.
    canvas = rng.uniform(80, 175) + rng.uniform(-20, 20, 3) + _field(rng, size, 1, 30.0)
    canvas += _field(rng, size, int(rng.integers(3, 9)), rng.uniform(8, 28))
    if rng.random() < 0.6:
        angle, period = rng.uniform(0, math.pi), size * rng.uniform(0.05, 0.25)
        at = np.arange(size) / period
        phase = at * math.cos(angle) + at[:, None] * math.sin(angle) + rng.random()
        wave = 4 * np.abs(phase - np.floor(phase) - 0.5) - 1
        canvas += wave[..., None] * rng.uniform(-22, 22, 3)
    return canvas


def _field(rng: np.random.Generator, size: int, cells: int, spread: float) -> Array:
    """Smooth noise from a grid of ``cells`` x ``cells``: (size, size, 3), about +-spread."""
    grid = rng.uniform(-spread, spread, (cells + 1, cells + 1, 3))
    at = (np.arange(size) + 0.5) * cells / size
    cell = at.astype(int)
    part = (at - cell)[:, None]
    part = part * part * (3 - 2 * part)
    rows: Array = grid[cell] + part[..., None] * (grid[cell + 1] - grid[cell])
    field: Array = rows[:, cell] + part * (rows[:, cell + 1] - rows[:, cell])
    return field


def _finish(rng: np.random.Generator, canvas: Array) -> Array:
    """Add pixel noise and round to uint8."""
    noisy: Array = canvas + rng.uniform(3, 10) * rng.standard_normal(canvas.shape)
    return noisy.round().clip(0, 255).astype(np.uint8)


def _stamp(kind: str, images: int, size: int, seed: int, split: str, least: int) -> Record:
    """Check the arguments; return them as the record that identifies a set."""
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


def _begin(root: Path, stamp: Record, names: list[str], overwrite: bool) -> bool:
    """Prepare the folders; False if the set is already there and complete."""
    folder, path = root / stamp['split'], root / f'{stamp["split"]}.meta.json'
    labels = root / 'annotations' / f'{stamp["split"]}.json'
    coco = [labels] if stamp['kind'] == 'coco' else []
    for place in (folder, *folder.parents, *(file.parent for file in coco)):
        if place.exists() and not place.is_dir():
            raise ValueError(f'{place} is a file: write the path of a folder as out')
    try:
        found = json.loads(path.read_text('utf-8')) if path.exists() else {}
        complete, ours = found.pop('complete', False), found.get('generator') == _GENERATOR
    except (ValueError, AttributeError, TypeError, OSError):
        found, complete, ours = {}, False, False
    # What other hands made is never replaced, whatever overwrite says.
    taken = [place for place in (path, *coco) if place.exists()]
    taken += list(folder.iterdir())[:1] if folder.is_dir() else []
    if taken and not ours:
        raise ValueError(
            f'{taken[0]} was not written by make_shapes: write another folder as out'
            ' or another split'
        )
    if complete and found != stamp and not overwrite:
        made = ', '.join(f'{key}={found.get(key)}' for key in stamp if key != 'generator')
        raise ValueError(
            f'{folder} holds another set ({made}): write another folder as out, or'
            ' overwrite=True (--overwrite) to replace it'
        )
    if (
        complete
        and found == stamp
        and all(place.exists() for place in (*coco, *(folder / name for name in names)))
    ):
        return False
    if found.get('kind') == 'coco':
        labels.unlink(missing_ok=True)
    root.mkdir(parents=True, exist_ok=True)
    _write_json(path, {**stamp, 'complete': False})
    for stale in list(folder.rglob('[0-9]' * 6 + '.png')):
        stale.unlink()
    for place in {(folder / name).parent for name in names} | {file.parent for file in coco}:
        place.mkdir(parents=True, exist_ok=True)
    return True


def _write_json(path: Path, content: Record) -> None:
    """Write atomically: a reader sees the old file or the new one, never a part."""
    part = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        part.write_text(json.dumps(content, separators=(',', ':')) + '\n', 'utf-8')
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _bar(count: int, progress: bool, title: str) -> Any:
    """``range(count)`` under a progress bar, or bare where tqdm is missing."""
    try:
        tqdm = importlib.import_module('tqdm').tqdm
    except ImportError:
        return range(count)
    return tqdm(range(count), desc=title, unit='image', disable=not progress)


def _need(module: str, package: str) -> Any:
    """Import an optional module; a missing one is one line that names the package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'shapes need {package}: pip install {package} ({error})') from None
