"""What an optimizer does to each module, as a table for the log."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..curvature import Layer
    from ..preconditioners import LayerStack
    from .base import PreconditionedOptimizer


def shapes(layer: Layer, stack: LayerStack) -> tuple[list[tuple[int, int, int]], ...]:
    """Shapes (b, n, n) of a layer's statistics and of its operators."""
    return ([layer.statistic_shape(name) for name in stack.requires],
            list(stack.method.operator_shapes(layer).values()))


def megabytes(layer: Layer, stack: LayerStack) -> float:
    """Memory of a layer's statistics and operators."""
    numbers = sum(b * n * m for kind in shapes(layer, stack) for b, n, m in kind)
    return numbers * layer.working_dtype.itemsize / 2**20


def table(optimizer: PreconditionedOptimizer) -> str:
    """The table: layer, preconditioner or reason why not, factor sizes, memory."""
    rows = [('layer', 'treatment', 'factors', 'MB')]
    total = 0.
    for layer, stack in optimizer.layers.items():
        memory = megabytes(layer, stack)
        total += memory
        factors = ' + '.join((f'{b} x ' if b > 1 else '') + f'{n}x{m}'
                             for b, n, m in shapes(layer, stack)[0])
        treatment = type(stack.method).__name__
        note = stack.method.note(layer)
        treatment += f' ({note})' if note else ''
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
