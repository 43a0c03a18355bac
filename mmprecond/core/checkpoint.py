"""The curvature in an optimizer's state: by parameter name, plain values only."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..preconditioners.sides import adapted
from .stack import COUNTERS

if TYPE_CHECKING:
    from torch import Tensor

    from ..curvature import Layer
    from ..optimizers.base import PreconditionedOptimizer
    from ..preconditioners import Preconditioner

logger = logging.getLogger('mmprecond')

#: Key of the curvature in `state_dict()`.
KEY = 'precond'


def export(optimizer: PreconditionedOptimizer) -> dict[str, Any]:
    """Steps and, if they are saved, each layer's method, statistics and operators."""
    layers = {}
    if optimizer.save_curvature:
        layers = {layer.name: {'method': type(stack.method).__name__, **state}
                  for stack in optimizer.stacks for layer, state in stack.export()}
    rotated = [layer.name for stack in optimizer.stacks if stack.method.rotates
               for _, layer in stack.ready()]
    return {'steps': optimizer.t, 'complete': optimizer.save_curvature, 'rotated': rotated,
            'whole': not layers or optimizer.sharding.is_whole(), 'layers': layers}


def restore(optimizer: PreconditionedOptimizer, saved: dict[str, Any] | None) -> list[Layer]:
    """Puts saved curvature back; without it the next step captures and refreshes afresh.

    Returns:
        Layers whose saved state does not fit.

    Raises:
        ValueError: For the state of a rank that had but a part of the operators.
    """
    if saved and not saved.get('whole', True):
        raise ValueError("the state is that of one rank under sharding='apply', which holds but a "
                         'part of the operators; load the one that the first rank saved')
    fitting: dict[Layer, dict[str, Any]] = {}
    complaints: list[str] = []
    unfit: list[Layer] = []
    entries = (saved or {}).get('layers') or {}
    by_name = {layer.name: (layer, stack.method) for layer, stack in optimizer.layers.items()}
    for name, entry in entries.items():  # in the saved order, which is the order of the stacks
        if name in by_name:
            layer, method = by_name[name]
            problem = _problem(entry, layer, method)
            if problem:
                complaints.append(f'{name}: {problem}')
                unfit.append(layer)
            else:
                fitting[layer] = entry
    steps = (saved or {}).get('steps')
    # Saved with its curvature, of which there was none yet.
    whole = (saved or {}).get('layers') == {} and bool((saved or {}).get('complete'))
    if entries and not isinstance(steps, int):
        complaints, fitting = ['it does not say after how many steps it was saved'], {}
    if entries and not fitting and not complaints:
        complaints = ["it holds none of this model's layers"]
    if complaints:
        more = f' and {len(complaints) - 3} more' if len(complaints) > 3 else ''
        logger.warning('saved curvature does not fit and is measured anew: %s%s',
                       '; '.join(complaints[:3]), more)
    elif not entries and steps != 0 and not whole:
        logger.warning('the checkpoint holds no curvature; statistics start anew at the next step')
    # Without operators the schedule starts over: step 0 captures and refreshes.
    optimizer.t = steps if (fitting or whole) and isinstance(steps, int) else 0
    for stack in optimizer.stacks:
        if stack.method.given and not any(layer in fitting for layer, its in
                                          optimizer.layers.items() if its is stack):
            continue  # what was given stays, unless the state has better
        stack.load({layer: state for layer, state in fitting.items()
                    if optimizer.layers[layer] is stack},
                   optimizer.sharding.holds(stack), optimizer.sharding.is_whole())
    _drop_lost_moments(optimizer, set((saved or {}).get('rotated') or ()), fitting)
    return unfit


def _drop_lost_moments(optimizer: PreconditionedOptimizer, rotated: set[str],
                       fitting: dict[Layer, dict[str, Any]]) -> None:
    """Clears the moments of layers that were kept in a basis which is not there."""
    lost = [layer for layer in optimizer.layers if layer.name in rotated and layer not in fitting]
    for layer in lost:
        for p in layer.parameters:
            optimizer.state.pop(p, None)
    if lost:
        logger.warning('%d layers lost the basis of their moments, which start anew', len(lost))


def _problem(entry: Any, layer: Layer, method: Preconditioner) -> str:
    """Why one layer's saved state cannot be used, or ''."""
    try:
        if entry['method'] != type(method).__name__:
            return f'it was saved by {entry["method"]}'
        [int(entry[name]) for name in COUNTERS]
        statistics = {name: layer.statistic_shape(name) for name in method.required(layer)}
        problem = _misfit('statistic', entry['statistics'], statistics)
        if entry['refreshes'] or entry['operator']:
            shapes = adapted(method.operator_shapes(layer), entry['operator'])
            problem = problem or _misfit('operator', entry['operator'], shapes)
        return problem
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f'it is corrupt ({type(error).__name__}: {error})'


def _misfit(kind: str, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, int, int]]) -> str:
    """Why saved tensors are not of the wanted names and shapes, or ''."""
    if set(tensors) != set(shapes):
        return f'its {kind} has {", ".join(tensors) or "nothing"}, not {", ".join(shapes)}'
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            return f'{name} has shape {tuple(tensor.shape)}, not {shapes[name]}'
        if not bool(tensor.isfinite().all()):
            return f'{name} is not finite'
    return ''
