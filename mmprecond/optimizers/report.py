"""What an optimizer does to each module, as a table for the log."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..curvature import Layer
    from ..preconditioners import LayerStack
    from .base import PreconditionedOptimizer


def factor_sides(layer: Layer, stack: LayerStack) -> list[int]:
    """Sides of the factors kept of a layer."""
    return [layer.side(name) for name in stack.requires]


def megabytes(layer: Layer, stack: LayerStack) -> float:
    """Memory of a layer's statistics and operators."""
    numbers = sum(2 * layer.blocks * side**2 for side in factor_sides(layer, stack))
    return numbers * layer.working_dtype.itemsize / 2**20


def table(optimizer: PreconditionedOptimizer) -> str:
    """The table: layer, preconditioner or reason why not, factor sizes, memory."""
    rows = [('layer', 'treatment', 'factors', 'MB')]
    total = 0.
    for layer, stack in optimizer.layers.items():
        memory = megabytes(layer, stack)
        total += memory
        factors = ' + '.join(f'{side}x{side}' for side in factor_sides(layer, stack))
        if layer.blocks > 1:
            factors = f'{layer.blocks} x ({factors})'
        treatment = type(stack.method).__name__
        if len(stack.requires) < len(stack.method.requires):
            treatment += f' (one side: the other is over max_dim={stack.method.max_dim})'
        rows.append((layer.name.removesuffix('.weight'), treatment, factors, f'{memory:.1f}'))
    for left in optimizer.left_out:
        rows.append((left.name or '(root)', f'plain rule: {left.kind}, {left.reason}', '', ''))
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in rows]
    lines.insert(1, '  '.join('-' * width for width in widths))
    lines.append(f'{len(optimizer.layers)} layers preconditioned, {total:.0f} MB of statistics and '
                 f'operators in total; {len(optimizer.left_out)} modules take the plain rule')
    return '\n'.join(lines)
