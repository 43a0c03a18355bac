"""Draws the matrices that each method keeps for one layer: the pictures of docs/methods.

Grey is the gradient, blue the input side, orange the output side. Green are bases, moments of the
rule, and other state. Dashed matrices are not kept.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

COLOURS = dict(gradient='#d9d9d9', input='#9ecae1', output='#fdae6b', state='#a1d99b', none='white')
#: Lengths by letter, in units. Patches (cp) have c = 8 channels and p = 9 positions.
LENGTHS = {'o': 2, 'i': 3, 'n': 3, 'm': 0.5, 'k': 0.3, 'r': 4 / 7, '1': 0.2}
LENGTHS |= {'cp': 3, 'c': 8 / 24, 'p': 9 / 24, 'C': 1.8, '3C': 5.4, 'd': 0.6}
WIDTH, HEIGHT, FONT = 6.0, 2.5, 14
#: In inches: mean width of a character, least gap, height of the tallest item, its centre.
CHARACTER, GAP, TALLEST, CENTRE = 0.108, 0.14, 1.55, 1.25
COSINES = 7

#: Part of an item: left, top (from the item's corner), width, height, kind, text.
Part = tuple[float, float, float, float, str, str]


@dataclass(frozen=True)
class Item:
    """One matrix of a picture.

    Attributes:
        name: Text inside it, or above it if it is too narrow or has parts.
        rows: Letter of the length of its columns.
        columns: Letter of the length of its rows.
        kind: Key of its colour, or '' for no frame.
        style: '', 'dashed', or, of a dashed matrix, what is kept of it: 'diagonal', 'rows' or
            'cosines'.
        parts: Matrices inside it.
        size: Text below it; default: its rows and columns.
    """

    name: str
    rows: str
    columns: str
    kind: str
    style: str = ''
    parts: tuple[Part, ...] = ()
    size: str = ''

    @property
    def label(self) -> str:
        """Text below it."""
        one = self.style == 'diagonal' or self.columns == '1'
        return self.size or (self.rows if one else f'{self.rows} × {self.columns}')

    @property
    def all_parts(self) -> list[Part]:
        """The matrix itself and the parts inside it."""
        width, height = LENGTHS[self.columns], LENGTHS[self.rows]
        frame: list[Part] = [(0, 0, width, height, 'none' if self.style else self.kind, '')]
        parts = list(self.parts)
        if self.style == 'rows':
            parts += [(0, top, width, 0.15, self.kind, '') for top in (0.3, 0.9, 1.5, 2.4)]
        elif self.style == 'cosines':
            step = width / COSINES
            parts += [(k * step, 0, step, height, self.kind, '') for k in (1, 4)]
        return frame * bool(self.kind) + parts

    def is_labelled_inside(self, scale: float) -> bool:
        """True if the name is written inside."""
        plain = not self.parts and self.style in ('', 'dashed')
        return plain and LENGTHS[self.columns] * scale >= CHARACTER * len(self.name) + 0.1

    def footprint(self, scale: float) -> float:
        """Width in inches with all texts."""
        name = '' if self.is_labelled_inside(scale) else self.name
        texts = max(len(self.label), len(name))
        return max(LENGTHS[self.columns] * scale, CHARACTER * texts)


G, M = Item('G', 'o', 'i', 'gradient'), Item('M', 'o', 'i', 'state')
L, R = Item('L', 'o', 'o', 'output'), Item('R', 'i', 'i', 'input')
L_COLUMNS, R_COLUMNS = Item('', 'o', 'k', 'output'), Item('', 'i', 'k', 'input')
GG = Item('GGᵀ', 'o', 'o', 'output'), Item('GᵀG', 'i', 'i', 'input')
U = Item('U₁', 'o', 'o', 'state'), Item('U₂', 'i', 'i', 'state')
BATCH = Item('g', 'n', 'o', 'output', 'rows'), Item('x', 'n', 'i', 'input', 'rows')
DRAWN = Item('', 'o', 'm', 'output'), Item('', 'i', 'm', 'input')
DIAGONAL = Item('s', 'o', 'o', 'output', 'diagonal'), Item('h', 'i', 'i', 'input', 'diagonal')
REDUCED = Item('m', 'i', 'r', 'state'), Item('v', 'i', 'r', 'state')
NO_R, H = Item('R', 'i', 'i', 'input', 'dashed'), Item('H', 'o', 'o', 'state', 'dashed')
A = Item('A', 'i', 'o', 'gradient')
HEADS: tuple[Part, ...] = tuple((0, 0.6 * k, 0.6, 0.6, 'output', '') for k in range(6))
QKV: tuple[Part, ...] = tuple((0, 1.8 * k, 1.8, 1.8, 'gradient', 'QKV'[k]) for k in range(3))
SHARED: tuple[Part, ...] = ((0, 0.9, 1.8, 1.8, 'input', 'R⁻¹'), (0, 3.6, 1.8, 1.8, 'input', 'D'))
ATTENTION = Item('', '3C', 'C', '', '', SHARED, 'C × C')

PICTURES: dict[str, list[Item]] = {
    'index': [
        Item('R', 'cp', 'cp', 'input'),
        Item('C', 'c', 'c', 'input'),
        Item('K', 'p', 'p', 'input'),
        Item('low rank', 'i', 'i', 'none', 'dashed', ((0, 0, 0.3, 3, 'input', ''),), 'n × k'),
    ],
    'nkfac': [L, L_COLUMNS, G, R_COLUMNS, R],
    'kfac': [L, Item('L⁻¹', 'o', 'o', 'output'), G, Item('R⁻¹', 'i', 'i', 'input'), R],
    'adabk': [L, Item('L^-½', 'o', 'o', 'output'), G, Item('R^-½', 'i', 'i', 'input'), R],
    'adamr': [L, U[0], G, U[1], R],
    'soap': [GG[0], U[0], G, U[1], GG[1]],
    'shampoo': [GG[0], L_COLUMNS, G, M, R_COLUMNS, GG[1]],
    'features': [G, R_COLUMNS, R],
    'skfac': [BATCH[0], DRAWN[0], G, DRAWN[1], BATCH[1]],
    'afopt': [
        Item('heads', '3C', 'd', '', '', HEADS, 'd × d'),
        Item('G', '3C', 'C', '', '', QKV),
        ATTENTION,
    ],
    'sgdph': [H, Item('d', 'o', '1', 'state'), Item('g', 'o', '1', 'gradient')],
    'mac': [Item('z', 'o', '1', 'output'), G, Item('a', 'i', '1', 'input'), NO_R],
    'adaact': [G, M, Item('v', 'i', 'i', 'input', 'diagonal')],
    'adafisher': [DIAGONAL[0], G, M, DIAGONAL[1]],
    'nysact': [G, Item('', 'i', 'r', 'input'), Item('Y', 'i', 'r', 'input'), NO_R],
    'soaa': [G, Item('m', 'o', 'i', 'state'), Item('v', 'o', 'i', 'state')],
    'aro': [Item('R', 'o', 'o', 'state'), G, M],
    'dctadamw': [A, Item('Q', 'o', 'o', 'state', 'cosines'), *REDUCED],
    'ramda': [
        G,
        Item('S', 'o', 'i', 'state'),
        Item('Q', 'o', 'i', 'state'),
        Item('p₀', 'o', 'i', 'state'),
    ],
    'preconditioned': [
        Item('AFOpt', '3C', 'C', '', '', QKV, 'attention'),
        ATTENTION,
        *(L, G, R),
        Item('rule', 'o', 'i', 'gradient', size='head'),
    ],
}


def draw(items: list[Item], path: Path) -> None:
    """Draws a row of matrices, in proportion, to an SVG file."""
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis('off')
    scale, gaps = TALLEST / max(LENGTHS[item.rows] for item in items), len(items) - 1
    while sum(item.footprint(scale) for item in items) + GAP * gaps > WIDTH - 0.1:
        scale *= 0.99
    widths = [item.footprint(scale) for item in items]
    gap = min(0.45, (WIDTH - 0.1 - sum(widths)) / gaps)
    x = (WIDTH - sum(widths) - gap * gaps) / 2
    for item, width in zip(items, widths, strict=True):
        draw_item(axes, item, x + width / 2, scale)
        x += width + gap
    figure.savefig(path, metadata=dict.fromkeys(('Date', 'Creator')))


def draw_item(axes: Axes, item: Item, middle: float, scale: float) -> None:
    """Draws one matrix with its texts around x = middle."""
    whole, high = LENGTHS[item.columns] * scale, LENGTHS[item.rows] * scale
    x, top = middle - whole / 2, CENTRE + high / 2
    for left, down, width, height, kind, text in item.all_parts:
        corner = x + left * scale, top - (down + height) * scale
        size, line = (width * scale, height * scale), '--' if kind == 'none' else '-'
        axes.add_patch(Rectangle(corner, *size, fc=COLOURS[kind], ec='black', ls=line))
        write(axes, corner[0] + size[0] / 2, corner[1] + size[1] / 2, text)
    if item.style == 'diagonal':
        ends, colour = ([x, x + whole], [top, top - high]), COLOURS[item.kind]
        axes.add_line(Line2D(*ends, color=colour, lw=6, solid_capstyle='butt'))
    for wave in range(COSINES if item.style == 'cosines' else 0):
        steps = [k / 24 for k in range(25)]
        turns = [wave + 0.5 + 0.35 * math.cos(math.pi * wave * step) for step in steps]
        across = [x + turn * whole / COSINES for turn in turns]
        axes.add_line(Line2D(across, [top - high * s for s in steps], color='black', lw=1))
    write(axes, middle, CENTRE if item.is_labelled_inside(scale) else top + 0.16, item.name)
    write(axes, middle, top - high - 0.18, item.label)


def write(axes: Axes, x: float, y: float, text: str) -> None:
    """Writes a text around a point."""
    if text:
        axes.text(x, y, text, fontsize=FONT, ha='center', va='center')


def main() -> None:
    """Draws all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, required=True, help='folder of the pictures')
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams.update({'svg.hashsalt': 'mmprecond', 'svg.fonttype': 'none'})
    for name, items in PICTURES.items():
        draw(items, folder / f'{name}.svg')


if __name__ == '__main__':
    main()
