"""Command line of the scripts that make a data set."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from . import ROOT


@dataclass(frozen=True)
class Script:
    """A script that makes sets of one generator.

    Attributes:
        name: File name of the script.
        summary: One line for ``--help``.
        coco: Function of ``mmprecond.datasets`` that writes COCO format.
        folders: Function of ``mmprecond.datasets`` that writes class folders.
        classification: Help of ``--classification``.
        images: Default number of images in words.
    """

    name: str
    summary: str
    coco: str
    folders: str
    classification: str
    images: str = '400'


class _Parser(argparse.ArgumentParser):
    """Argument parser with one-line errors."""

    def error(self, message: str) -> NoReturn:
        """Prints ``message`` and exits with status 2."""
        self.exit(2, f'{self.prog}: {message} (see --help)\n')


def parse_args(script: Script, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = _Parser(prog=script.name, description=script.summary)
    parser.add_argument('out', metavar='OUT', help='data root, made if it is missing')
    parser.add_argument(
        '--images', type=int, metavar='N', help=f'number of images (default: {script.images})'
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
    parser.add_argument('--classification', action='store_true', help=script.classification)
    parser.add_argument(
        '--overwrite', action='store_true', help='replace a set that was made with other arguments'
    )
    return parser.parse_args(argv)


def main(script: Script, argv: Sequence[str] | None = None) -> int:
    """Makes the set and prints its path.

    Returns:
        The exit status: 0, 2 after an error, 130 after Ctrl-C.
    """
    args = parse_args(script, argv)
    options = {name: getattr(args, name) for name in ('images', 'size')}
    try:
        out = _maker(script.folders if args.classification else script.coco)(
            args.out,
            seed=args.seed,
            split=args.split,
            overwrite=args.overwrite,
            **{name: value for name, value in options.items() if value is not None},
        )
    except (ImportError, OSError, ValueError) as error:
        print(f'{script.name}: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f'{script.name}: interrupted; the same command starts over', file=sys.stderr)
        return 130
    made = json.loads((out / f'{args.split}.meta.json').read_text('utf-8'))
    labels = '' if args.classification else f', labels in {out / "annotations" / args.split}.json'
    print(f'{made["images"]} images of {made["size"]} px in {out / args.split}{labels}')
    return 0


def _maker(name: str) -> Callable[..., Path]:
    """Function of ``mmprecond.datasets``, which need not be installed."""
    try:
        import mmprecond  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != 'mmprecond':
            raise
        sys.path.insert(0, str(ROOT))
    maker: Callable[..., Path] = getattr(importlib.import_module('mmprecond.datasets'), name)
    return maker
