#!/usr/bin/env python3
"""Makes a synthetic shapes data set: COCO format, or class folders with --classification.

Example:
    python tools/make_shapes.py data/shapes --images 400 --size 160 --seed 0 --split train
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from common import data_sets

SCRIPT = data_sets.Script(
    name='make_shapes.py',
    summary=(__doc__ or '').splitlines()[0],
    coco='make_shapes',
    folders='make_shape_folders',
    classification='one shape per image, one folder per class',
)


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the set; returns the exit status."""
    return data_sets.main(SCRIPT, argv)


if __name__ == '__main__':
    sys.exit(main())
