#!/usr/bin/env python3
"""Make a synthetic shapes data set: COCO format, or class folders with --classification.

Example:
    python tools/make_shapes.py data/shapes --images 400 --size 160 --seed 0 --split train
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    """Argument parser with one-line errors."""

    def error(self, message: str) -> NoReturn:
        """Print ``message`` and exit with status 2."""
        self.exit(2, f'{self.prog}: {message} (see --help)\n')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = _Parser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('out', metavar='OUT', help='data root, made if it is missing')
    parser.add_argument(
        '--images',
        type=int,
        default=400,
        metavar='N',
        help='number of images (default: %(default)s)',
    )
    parser.add_argument(
        '--size',
        type=int,
        metavar='S',
        help='height and width in pixels (default: 160, classification: 32)',
    )
    parser.add_argument(
        '--seed',
        type=int,
        default=0,
        metavar='K',
        help='same seed, same bytes (default: %(default)s)',
    )
    parser.add_argument(
        '--split',
        default='train',
        help='name of the image folder, such as train or val (default: %(default)s)',
    )
    parser.add_argument(
        '--classification', action='store_true', help='one shape per image, one folder per class'
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='replace a set that was made with other arguments'
    )
    args = parser.parse_args(argv)
    if args.size is None:
        args.size = 32 if args.classification else 160
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Make the set and print its path.

    Returns:
        The exit status: 0, 2 after an error, 130 after Ctrl-C.
    """
    args = parse_args(argv)
    try:
        try:
            import mmprecond  # noqa: F401
        except ModuleNotFoundError as error:
            if error.name != 'mmprecond':
                raise
            sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        from mmprecond.datasets import make_shape_folders, make_shapes

        make = make_shape_folders if args.classification else make_shapes
        out = make(
            args.out, args.images, args.size, args.seed, args.split, overwrite=args.overwrite
        )
    except (ImportError, OSError, ValueError) as error:
        print(f'make_shapes.py: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('make_shapes.py: interrupted; the same command starts over', file=sys.stderr)
        return 130
    labels = '' if args.classification else f', labels in {out / "annotations" / args.split}.json'
    print(f'{args.images} images of {args.size} px in {out / args.split}{labels}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
