"""Layer table for the log: the treatment of each module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..curvature import Layer, LeftOut
from .cost import cost_of
from .coverage import Coverage
from .memory import forecast, megabytes
from .overview import aligned
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


def summary(
    model: str,
    layers: Mapping[Layer, LayerStack],
    coverage: Coverage,
    sharding: Sharding,
    groups: Iterable[Mapping[str, Any]],
) -> str:
    """Sentence with the methods and their numbers of layers, the share of parameters, the cost.

    Args:
        model: Name of the model.
        layers: The layers and their stacks.
        coverage: What is preconditioned.
        sharding: Division of the work among ranks.
        groups: The optimizer's parameter groups.
    """
    trained = [(layer, stack) for layer, stack in layers.items() if layer.weight.requires_grad]
    one_of_each = {stack: layer for layer, stack in trained}  # costs are equal in a stack
    costs = {stack: cost_of(layer, stack) for stack, layer in one_of_each.items()}
    flops = sum(costs[stack].per_step(stack.method) for _, stack in trained)
    covered = sum(p.numel() for layer, _ in trained for p in layer.parameters)
    total = sum(p.numel() for group in groups for p in group['params'] if p.requires_grad)
    methods = Counter(stack.method.title for stack in layers.values())
    sizes = forecast(layers, sharding).values()  # empty if all layers are frozen
    kept, more = (sum(size[k] for size in sizes) for k in range(2))
    idle = ''.join(
        f'; {method.title} takes no layer, because no attention module is trained and can be read'
        for method in coverage.idle
    )
    return (
        f'mmprecond attached {" and ".join(f"{name} to {n}" for name, n in methods.items())} '
        f'{"layer" if len(layers) == 1 else "layers"} of {model}, which hold '
        f'{100 * covered / max(1, total):.1f} % of {total / 1e6:.2f} M trained parameters; '
        f'forecast cost: {flops / 1e9:.3g} GFLOP a step without captures, {kept:.0f} MB, '
        f'and {more:.0f} MB more during a refresh; {len(coverage.left_out)} modules take the plain '
        f'rule{idle}'
    )


def describe_methods(layers: Mapping[Layer, LayerStack]) -> list[str]:
    """A line for each method, with its number of layers and its intervals."""
    counts = Counter(stack.method for stack in layers.values())
    return [
        f'{method.title} on {number} {"layer" if number == 1 else "layers"}'
        f'{" by their gradients" if method == method.with_gradient_source() else ""}: '
        f'captures every {method.capture_interval} steps, refreshes every {method.refresh_interval}'
        for method, number in counts.items()
    ]


def table(layers: Mapping[Layer, LayerStack], coverage: Coverage, sharding: Sharding) -> str:
    """Layer table: layer, preconditioner or reason for the plain rule, factor sizes, memory."""
    rows: list[tuple[str, ...]] = [('layer', 'treatment', 'factors', 'MB')]
    for layer, stack in layers.items():
        memory = megabytes(layer, stack, sharding.holds(stack))
        shapes = [shape for statistic in stack.kept for shape in layer.shapes(statistic).values()]
        factors = ' + '.join((f'{b} x ' if b > 1 else '') + f'{n}x{m}' for b, n, m in shapes)
        frozen = '' if layer.weight.requires_grad else 'frozen, costs nothing until it is trained'
        notes = '; '.join(note for note in (stack.method.note(layer), frozen) if note)
        treatment = stack.method.title + (f' ({notes})' if notes else '')
        rows.append((layer.name.removesuffix('.weight'), treatment, factors, f'{memory:.1f}'))
    rows += [
        (left.name, f'not read as attention: {left.kind}, {left.reason}', '', '')
        for left in coverage.unread
    ]
    for left in coverage.left_out:
        rows.append((left.name or '(root)', f'plain rule: {left.kind}, {left.reason}', '', ''))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple('-' * width for width in widths))
    lines = aligned(rows, left=4)
    counts = count(layers, coverage.left_out)
    lines.append(
        f'{counts["measured"]} of {len(layers)} layers measured so far, '
        f'{counts["preconditioned"]} with an operator'
    )
    return '\n'.join(lines)
