"""Layer table for the log: the treatment of each module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..curvature import Layer, LeftOut
from .memory import forecast, megabytes
from .sharding import Sharding
from .stack import LayerStack


def count(layers: Mapping[Layer, LayerStack], left_out: Sequence[LeftOut]) -> dict[str, int]:
    """Number of layers that were measured, that have an operator, and that take the plain rule."""
    acting = {layer for stack in set(layers.values()) for _, layer in stack.ready()}
    return {
        'measured': sum(stack.holds(layer) for layer, stack in layers.items()),
        'preconditioned': len(acting),
        'plain': len(layers) - len(acting) + len(left_out),
    }


def table(
    layers: Mapping[Layer, LayerStack], left_out: Sequence[LeftOut], sharding: Sharding
) -> str:
    """Layer table: layer, preconditioner or reason for the plain rule, factor sizes, memory."""
    rows = [('layer', 'treatment', 'factors', 'MB')]
    for layer, stack in layers.items():
        memory = megabytes(layer, stack, sharding.holds(stack))
        shapes = [shape for statistic in stack.kept for shape in layer.shapes(statistic).values()]
        factors = ' + '.join((f'{b} x ' if b > 1 else '') + f'{n}x{m}' for b, n, m in shapes)
        frozen = '' if layer.weight.requires_grad else 'frozen, costs nothing until it is trained'
        notes = '; '.join(note for note in (stack.method.note(layer), frozen) if note)
        treatment = type(stack.method).__name__ + (f' ({notes})' if notes else '')
        rows.append((layer.name.removesuffix('.weight'), treatment, factors, f'{memory:.1f}'))
    for left in left_out:
        rows.append((left.name or '(root)', f'plain rule: {left.kind}, {left.reason}', '', ''))
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    lines = [
        '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, '  '.join('-' * width for width in widths))
    sizes = forecast(layers, sharding).values()
    counts = count(layers, left_out)
    lines.append(
        f'{len(layers)} layers preconditioned ({counts["measured"]} measured and '
        f'{counts["preconditioned"]} with an operator so far), '
        f'{sum(kept for kept, _ in sizes):.0f} MB of statistics and operators in total, '
        f'{sum(more for _, more in sizes):.0f} MB more at a refresh; '
        f'{len(left_out)} modules take the plain rule'
    )
    return '\n'.join(lines)
