"""The curvature in an optimizer's state: by parameter name, plain values only."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..curvature import Layer
    from .base import PreconditionedOptimizer

logger = logging.getLogger('mmprecond')

#: Key of the curvature in `state_dict()`.
KEY = 'precond'


def export(optimizer: PreconditionedOptimizer) -> dict[str, Any]:
    """Steps, method and, if they are saved, each layer's statistics and operators."""
    layers = {}
    if optimizer.save_curvature:
        layers = {layer.name: state for stack in optimizer.stacks
                  for layer, state in stack.export()}
    return {'method': type(optimizer.method).__name__, 'steps': optimizer.t, 'layers': layers}


def restore(optimizer: PreconditionedOptimizer, saved: dict[str, Any] | None) -> None:
    """Puts saved curvature back; without it the next step captures and refreshes afresh."""
    fitting: dict[Layer, dict[str, Any]] = {}
    complaints = []
    by_name: dict[str, tuple[Layer, tuple[str, ...]]] = {}
    entries = (saved or {}).get('layers') or {}
    for layer, stack in optimizer.layers.items():
        by_name[layer.name] = layer, stack.requires
    for name, entry in entries.items():  # in the saved order, which is the order of the stacks
        if name in by_name:
            layer, requires = by_name[name]
            problem = _problem(entry, layer, requires)
            if problem:
                complaints.append(f'{name}: {problem}')
            else:
                fitting[layer] = entry
    if saved and saved.get('method') != type(optimizer.method).__name__:
        complaints = [f'it was saved by {saved.get("method")}']
        fitting = {}
    steps = (saved or {}).get('steps')
    if entries and not isinstance(steps, int):
        complaints, fitting = ['it does not say after how many steps it was saved'], {}
    if entries and not fitting and not complaints:
        complaints = ["it holds none of this model's layers"]
    if complaints:
        more = f' and {len(complaints) - 3} more' if len(complaints) > 3 else ''
        logger.warning('saved curvature does not fit and is measured anew: %s%s',
                       '; '.join(complaints[:3]), more)
    elif not entries and steps != 0:
        logger.warning('the checkpoint holds no curvature; statistics start anew at the next step')
    # Without operators the schedule starts over: step 0 captures and refreshes.
    optimizer.t = steps if fitting and isinstance(steps, int) else 0
    for stack in optimizer.stacks:
        stack.load({layer: state for layer, state in fitting.items()
                    if optimizer.layers[layer] is stack})


def _problem(entry: Any, layer: Layer, requires: tuple[str, ...]) -> str:
    """Why one layer's saved state cannot be used, or ''."""
    try:
        statistics, operator = entry['statistics'], entry['operator']
        int(entry['refreshes']), int(entry['failures'])
        if set(statistics) != set(requires):
            return f'it has {", ".join(statistics)}, not {", ".join(requires)}'
        if entry['refreshes'] and set(operator) != set(requires):
            return f'its operator has {", ".join(operator) or "nothing"}, not {", ".join(requires)}'
        for name, tensor in [*statistics.items(), *operator.items()]:
            wanted = (layer.blocks, layer.side(name), layer.side(name))
            if tuple(tensor.shape) != wanted:
                return f'{name} has shape {tuple(tensor.shape)}, not {wanted}'
            if not bool(tensor.isfinite().all()):
                return f'{name} is not finite'
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f'it is corrupt ({type(error).__name__}: {error})'
    return ''
