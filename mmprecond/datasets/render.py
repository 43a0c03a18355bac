"""Images of shapes, drawn at random.

Coordinates are continuous, as in COCO: pixel ``i`` covers ``[i, i + 1]``, x grows to the right
and y downwards.
"""

from __future__ import annotations

import math

import numpy as np

from .writer import Array, Record, need

CLASSES = ('circle', 'square', 'triangle', 'star')
PALETTE = ((220, 20, 60), (0, 114, 189), (237, 177, 32), (119, 172, 48))
RENDER_VERSION = 1  # raised with every change of pixels or annotations, to recognise old sets
_MIN_DIAMETER = 6.0  # pixels; keeps every clipped box wider than 1 pixel
_MIN_VISIBLE = 0.25  # least uncovered part of an annotated shape
_GRID = 16  # vertices lie on 1/16 pixel: exact in binary, so sums of box values are exact
_SUPERSAMPLE = 4
_VERTICES = {'circle': 36, 'square': 4, 'triangle': 3, 'star': 10}

Points = list[tuple[float, float]]


def render_image(rng: np.random.Generator, size: int) -> tuple[Array, list[Record]]:
    """Draws one image of 1 to 5 overlapping shapes; later shapes cover earlier ones.

    Args:
        rng: Source of all randomness.
        size: Height and width in pixels, >= 32.

    Returns:
        The image, uint8 (size, size, 3) RGB, and at least one COCO annotation without ids. Each
        shape with at least 25 % visible has one. Boxes are xywh in pixels, areas are in px^2.

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
    return _add_noise(rng, canvas), [
        _annotation(label, polygon)
        for index, (label, polygon, pixels) in enumerate(drawn)
        if np.count_nonzero(owner == index) >= _MIN_VISIBLE * pixels
    ]


def _angle(rng: np.random.Generator) -> float:
    """Angle of a roughly upright shape, so that a short training run can learn the classes."""
    return float(rng.uniform(-0.35, 0.35)) - math.pi / 2


def render_single(rng: np.random.Generator, size: int, label: int) -> Array:
    """Draws one shape near the middle: uint8 (size, size, 3)."""
    canvas = _background(rng, size)
    diameter = size * rng.uniform(0.5, 0.85)
    centre = size * rng.uniform(0.42, 0.58, 2)
    _paint(rng, canvas, _polygon(label, centre, diameter, _angle(rng), size))
    return _add_noise(rng, canvas)


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
    clipped: Points = []
    for before, point in zip(points[-1:] + points[:-1], points, strict=True):
        inside, outside = sign * (point[axis] - bound), sign * (before[axis] - bound)
        if (inside >= 0) != (outside >= 0):
            part = outside / (outside - inside)
            clipped.append(
                (
                    before[0] + part * (point[0] - before[0]),
                    before[1] + part * (point[1] - before[1]),
                )
            )
        if inside >= 0:
            clipped.append(point)
    return clipped


def _coverage(polygon: Array, size: int) -> Array:
    """Share of each pixel that a clipped polygon (n, 2) covers: (size, size) in [0, 1]."""
    image, draw = need('PIL.Image', 'pillow'), need('PIL.ImageDraw', 'pillow')
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
    colour = contrasting_colour(rng, under, 80)
    # A brightness slope, so that a shape has more than one colour.
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    steps = (np.arange(size)[:, None] + 0.5 - (low + high) / 2) / (high - low)
    slope = rng.uniform(-45, 45, 2)
    shade = steps[:, 0] * slope[0] + steps[:, 1, None] * slope[1]
    canvas += cover * (colour + shade[..., None] - canvas)
    return cover[..., 0]


def contrasting_colour(rng: np.random.Generator, under: Array, contrast: float) -> Array:
    """Random colour (3,) that can be seen on another one.

    Args:
        rng: Source of all randomness.
        under: Mean colour below, (3,) in [0, 255].
        contrast: Least Euclidean distance of the two. The farthest of 16 colours is taken where
            none is as far.
    """
    colours = rng.uniform(20, 235, (16, 3))
    distance = np.sqrt(((colours - under) ** 2).sum(axis=1))
    far = np.flatnonzero(distance >= contrast)
    colour: Array = colours[far[0] if len(far) else np.argmax(distance)]
    return colour


def _background(rng: np.random.Generator, size: int) -> Array:
    """Colour gradient, low-frequency noise and often stripes: float64 (size, size, 3)."""
    # Plain arithmetic alone: the rounding of np.sin or BLAS depends on the processor.
    canvas = rng.uniform(80, 175) + rng.uniform(-20, 20, 3) + _smooth_noise(rng, size, 1, 30.0)
    canvas += _smooth_noise(rng, size, int(rng.integers(3, 9)), rng.uniform(8, 28))
    if rng.random() < 0.6:
        angle, period = rng.uniform(0, math.pi), size * rng.uniform(0.05, 0.25)
        at = np.arange(size) / period
        phase = at * math.cos(angle) + at[:, None] * math.sin(angle) + rng.random()
        wave = 4 * np.abs(phase - np.floor(phase) - 0.5) - 1
        canvas += wave[..., None] * rng.uniform(-22, 22, 3)
    return canvas


def _smooth_noise(rng: np.random.Generator, size: int, cells: int, spread: float) -> Array:
    """Smooth noise from a grid of ``cells`` x ``cells``: (size, size, 3), about +-spread."""
    grid = rng.uniform(-spread, spread, (cells + 1, cells + 1, 3))
    at = (np.arange(size) + 0.5) * cells / size
    cell = at.astype(int)
    part = (at - cell)[:, None]
    part = part * part * (3 - 2 * part)
    rows: Array = grid[cell] + part[..., None] * (grid[cell + 1] - grid[cell])
    field: Array = rows[:, cell] + part * (rows[:, cell + 1] - rows[:, cell])
    return field


def _add_noise(rng: np.random.Generator, canvas: Array) -> Array:
    """Adds pixel noise and rounds to uint8."""
    noisy: Array = canvas + rng.uniform(3, 10) * rng.standard_normal(canvas.shape)
    return noisy.round().clip(0, 255).astype(np.uint8)
