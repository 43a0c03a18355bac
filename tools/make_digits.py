#!/usr/bin/env python3
"""Makes a data set of handwritten digits: COCO format, or class folders with --classification.

Example:
    python tools/make_digits.py data/digits --images 400 --size 160 --seed 0 --split train
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from common import data_sets

SCRIPT = data_sets.Script(
    name='make_digits.py',
    summary=(__doc__ or '').splitlines()[0],
    coco='make_digits',
    folders='make_digit_folders',
    classification='digits alone, one folder per class',
    images='400, classification: all of the split',
)


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the set; returns the exit status."""
    return data_sets.main(SCRIPT, argv)


if __name__ == '__main__':
    sys.exit(main())
