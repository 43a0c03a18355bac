"""What an optimizer does to each module, as a table for the log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .memory import forecast, megabytes

if TYPE_CHECKING:
    from torch import Tensor

    from ..optimizers.base import PreconditionedOptimizer


def table(optimizer: PreconditionedOptimizer) -> str:
    """The table: layer, preconditioner or reason why not, factor sizes, memory."""
    rows = [('layer', 'treatment', 'factors', 'MB')]
    for layer, stack in optimizer.layers.items():
        memory = megabytes(layer, stack, optimizer.sharding.holds(stack))
        factors = ' + '.join((f'{b} x ' if b > 1 else '') + f'{n}x{m}' for b, n, m
                             in map(layer.statistic_shape, stack.requires))
        frozen = '' if layer.weight.requires_grad else 'frozen, costs nothing until it is trained'
        notes = '; '.join(note for note in (stack.method.note(layer), frozen) if note)
        treatment = type(stack.method).__name__ + (f' ({notes})' if notes else '')
        rows.append((layer.name.removesuffix('.weight'), treatment, factors, f'{memory:.1f}'))
    for left in optimizer.left_out:
        rows.append((left.name or '(root)', f'plain rule: {left.kind}, {left.reason}', '', ''))
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in rows]
    lines.insert(1, '  '.join('-' * width for width in widths))
    sizes = forecast(optimizer).values()
    lines.append(f'{len(optimizer.layers)} layers preconditioned, '
                 f'{sum(kept for kept, _ in sizes):.0f} MB of statistics and operators in total, '
                 f'{sum(more for _, more in sizes):.0f} MB more at a refresh; '
                 f'{len(optimizer.left_out)} modules take the plain rule')
    names: dict[Tensor, str] = {layer.weight: layer.name for layer in optimizer.layers}
    return '\n'.join([*lines, *optimizer.rule.notes(optimizer.param_groups, names)])
