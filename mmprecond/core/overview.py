"""Overview for the log: what is attached by stage of the model, and what is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from ..checks import first_names
from ..curvature import Layer, LeftOut
from .coverage import Coverage
from .memory import megabytes
from .sharding import Sharding
from .stack import LayerStack

HEADERS = ('stage', 'preconditioner', 'parameters', 'MB')
#: Number of names in a line about modules that are left out.
SHOWN = 2


def overview(layers: Mapping[Layer, LayerStack], coverage: Coverage, sharding: Sharding) -> str:
    """Modules that cannot be preconditioned, then a row for each stage, then the norms in one line.

    Args:
        layers: The layers and their stacks.
        coverage: What is preconditioned, and what is not.
        sharding: Division of the work among ranks.
    """
    norms = [left for left in coverage.left_out if is_norm(left)]
    others = [left for left in coverage.left_out if not is_norm(left)]
    lines = [f'not read as attention: {text}' for text in _fold(coverage.unread)]
    lines += [f'plain rule: {text}' for text in _fold(others)]
    lines += aligned([HEADERS, *_stages(layers, sharding)], left=2)
    counts = Counter(left.kind for left in norms)
    if counts:
        lines.append(f'plain rule: {", ".join(f"{n} {kind}" for kind, n in counts.items())}')
    return '\n'.join(lines)


def stage_of(name: str) -> str:
    """Stage of a layer: the first two parts of its name, of a backbone's lists three."""
    parts = name.removesuffix('.weight').split('.')
    listed = parts[0] == 'backbone' and len(parts) > 3 and not parts[1][-1].isdigit()
    return '.'.join(parts[: 3 if listed else 2])


def is_norm(left: LeftOut) -> bool:
    """True for a norm layer, which nobody expects to be preconditioned."""
    return 'Norm' in left.kind


def aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of a table, whose first columns are aligned to the left and all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        '  '.join(
            cell.ljust(width) if k < left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _stages(
    layers: Mapping[Layer, LayerStack], sharding: Sharding
) -> Iterable[tuple[str, str, str, str]]:
    """Cells of each stage; equal treatments of its layers are counted."""
    stages: dict[str, list[Layer]] = {}
    for layer in layers:
        stages.setdefault(stage_of(layer.name), []).append(layer)
    for stage, members in stages.items():
        counts = Counter(_treatment(layer, layers[layer]) for layer in members)
        parameters = sum(p.numel() for layer in members for p in layer.parameters)
        held = sum(
            megabytes(layer, layers[layer], sharding.holds(layers[layer])) for layer in members
        )
        words = ', '.join(f'{count} x {text}' for text, count in counts.items())
        yield stage, words, f'{parameters:,}', f'{held:.1f}'


def _treatment(layer: Layer, stack: LayerStack) -> str:
    """Method of a layer, with a note if a side is left out, or if the layer is frozen."""
    if not layer.weight.requires_grad:
        return f'{stack.method.title} (frozen, costs nothing)'
    partial = len(stack.kept) < len(stack.method.candidate_statistics(layer))
    return stack.method.title + (f' ({stack.method.note(layer)})' if partial else '')


def _fold(entries: Sequence[LeftOut]) -> list[str]:
    """Texts of modules with equal kinds and reasons, with the first names."""
    folded: dict[tuple[str, str], list[str]] = {}
    for left in entries:
        folded.setdefault((left.kind, left.reason), []).append(left.name or '(root)')
    return [
        f'{len(names)} x {kind}, {reason} ({first_names(names, SHOWN)})'
        for (kind, reason), names in folded.items()
    ]
