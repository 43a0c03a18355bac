"""Curvature in an optimizer's state dict: plain values by parameter name."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..curvature import Layer
from ..linalg import Shape, expected_shapes
from .sharding import Sharding
from .stack import COUNTERS, LayerStack

logger = logging.getLogger('mmprecond')

#: Key of the curvature in `state_dict()`.
CURVATURE_KEY = 'precond'
#: Key of the positions of parameters with rotated moments.
ROTATED_KEY = 'rotated_positions'


@dataclass
class Restored:
    """Outcome of loading a state.

    Attributes:
        steps: Number of steps taken.
        start: First step of the schedule; that of the checkpoint if no operators were restored.
        share: Share of its target that the learning rate had reached.
        restored: Layers whose state was restored.
        unfit: Layers whose saved state does not fit.
        lost: Layers whose moments are in a basis that was not restored.
    """

    steps: int
    start: int
    share: float
    restored: list[Layer] = field(default_factory=list)
    unfit: list[Layer] = field(default_factory=list)
    lost: list[Layer] = field(default_factory=list)


def export(
    layers: Mapping[Layer, LayerStack],
    sharding: Sharding,
    steps: int,
    share: float,
    complete: bool,
) -> dict[str, Any]:
    """Exports the steps and, if `complete`, each layer's method, statistics and operators.

    Args:
        layers: The layers and their stacks.
        sharding: Distribution of the operators over ranks.
        steps: Number of steps taken.
        share: Share of its target that the learning rate has reached so far.
        complete: Whether to save statistics and operators.
    """
    stacks = list(dict.fromkeys(layers.values()))
    saved = (
        {
            layer.name: {'method': type(stack.method).__name__, **state}
            for stack in stacks
            for layer, state in stack.export()
        }
        if complete
        else {}
    )
    rotated = [layer.name for stack in stacks if stack.method.rotates for _, layer in stack.ready()]
    return {
        'steps': steps,
        **({'reached': share} if share < 1 else {}),
        'complete': complete,
        'rotated': rotated,
        'whole': not saved or sharding.is_whole(),
        'layers': saved,
    }


def method_of(saved: Mapping[str, Any] | None, layer: Layer) -> str | None:
    """Name of the method by which a layer's state was saved, or None."""
    entry = ((saved or {}).get('layers') or {}).get(layer.name)
    return entry.get('method') if isinstance(entry, dict) else None


def of_gradients(
    layers: Mapping[Layer, LayerStack], saved: Mapping[str, Any] | None
) -> list[Layer]:
    """Layers whose saved statistics are of the gradient matrix, and whose present ones are not."""
    found = []
    entries = (saved or {}).get('layers') or {}
    for layer, stack in layers.items():
        other = stack.method.with_gradient_source()
        entry = entries.get(layer.name)
        if other is None or other == stack.method or not isinstance(entry, dict):
            continue
        keys = {key for s in other.selected_statistics(layer) for key in s.keys}
        if keys == set(entry.get('statistics') or ()):
            found.append(layer)
    return found


def refuse_partial(saved: Mapping[str, Any] | None) -> None:
    """Raises ValueError for the state of a rank that had only a part of the operators."""
    if not (saved or {}).get('whole', True):
        raise ValueError(
            "the state is that of one rank under sharding='apply', which holds only a "
            'part of the operators; load the state that the first rank saved'
        )


def restore(
    layers: Mapping[Layer, LayerStack], sharding: Sharding, saved: Mapping[str, Any] | None
) -> Restored:
    """Restores saved curvature; without it the next step captures and refreshes anew.

    Args:
        layers: The layers and their stacks.
        sharding: Distribution of the operators over ranks.
        saved: Result of `export`, or None.
    """
    saved = saved or {}
    entries = saved.get('layers') or {}
    steps = saved.get('steps')
    fitting, unfit, complaints = _match_states(layers, entries)
    # Saved with its curvature, of which there was none yet.
    whole = saved.get('layers') == {} and bool(saved.get('complete'))
    if entries and not isinstance(steps, int):
        complaints, fitting = ['it does not say after how many steps it was saved'], {}
    if entries and not fitting and not complaints:
        complaints = ["it holds none of this model's layers"]
    if complaints:
        more = f' and {len(complaints) - 3} more' if len(complaints) > 3 else ''
        logger.warning(
            'saved curvature does not fit and is measured anew: %s%s',
            '; '.join(complaints[:3]),
            more,
        )
    elif not entries and steps != 0 and not whole:
        logger.warning(
            'the checkpoint holds no curvature; statistics start anew at the next captures'
        )
    for stack in dict.fromkeys(layers.values()):
        states = {layer: state for layer, state in fitting.items() if layers[layer] is stack}
        if states or not stack.method.precomputed:  # precomputed statistics stay
            stack.load(states, sharding.holds(stack), sharding.is_whole())
    rotated = set(saved.get('rotated') or ())
    lost = [layer for layer in layers if layer.name in rotated and layer not in fitting]
    start = saved.get('start') if fitting or whole else steps
    resumed, start = (number if isinstance(number, int) else 0 for number in (steps, start))
    share = saved.get('reached', 1.0)
    share = share if isinstance(share, float) else 1.0
    return Restored(resumed, start, share, list(fitting), unfit, lost)


def rotated_positions(
    saved: Mapping[str, Any], layers: Iterable[Layer], params: Sequence[Tensor]
) -> list[int]:
    """Positions of the parameters whose moments are in a layer's basis.

    Args:
        saved: Result of `export`.
        layers: The layers.
        params: Parameters of the optimizer's groups, in their order.
    """
    names = set(saved['rotated'])
    rotated = {p for layer in layers if layer.name in names for p in layer.parameters}
    return [position for position, p in enumerate(params) if p in rotated]


def lost_parameters(
    saved: Mapping[str, Any] | None, restored: Restored, params: Sequence[Tensor]
) -> set[Tensor]:
    """Parameters whose saved moments are in a basis that was not restored.

    They may belong to no layer now, or to one of another name: their positions tell.
    """
    lost: set[Tensor] = {p for layer in restored.lost for p in layer.parameters}
    kept = {p for layer in restored.restored for p in layer.parameters}
    positions = (saved or {}).get(ROTATED_KEY) or ()
    lost.update(params[k] for k in positions if params[k] not in kept)
    if lost:
        logger.warning(
            'moments in bases that were not restored start anew (of parameters: %d)', len(lost)
        )
    return lost


def _match_states(
    layers: Mapping[Layer, LayerStack],
    entries: Mapping[str, Any],
) -> tuple[dict[Layer, dict[str, Any]], list[Layer], list[str]]:
    """Returns states that fit their layers, layers whose states do not fit, and reasons."""
    fitting: dict[Layer, dict[str, Any]] = {}
    unfit: list[Layer] = []
    complaints: list[str] = []
    by_name = {layer.name: layer for layer in layers}
    for name, entry in entries.items():  # in the saved order, which is the order of the stacks
        layer = by_name.get(name)
        if layer is None:
            continue
        problem = _entry_misfit(entry, layer, layers[layer])
        if problem:
            complaints.append(f'{name}: {problem}')
            unfit.append(layer)
        else:
            fitting[layer] = entry
    return fitting, unfit, complaints


def _entry_misfit(entry: Any, layer: Layer, stack: LayerStack) -> str:
    """Reason why one layer's saved state cannot be used, or ''."""
    try:
        if entry['method'] != type(stack.method).__name__:
            return f'it was saved by {entry["method"]}'
        [int(entry[name]) for name in COUNTERS]
        statistics = {
            key: shape for statistic in stack.kept for key, shape in layer.shapes(statistic).items()
        }
        problem = _tensor_misfit('statistic', entry['statistics'], statistics)
        if entry['refreshes'] or entry['operator']:
            shapes = expected_shapes(stack.outline, entry['operator'])
            problem = problem or _tensor_misfit('operator', entry['operator'], shapes)
        return problem
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f'it is corrupt ({type(error).__name__}: {error})'


def _tensor_misfit(kind: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> str:
    """Reason why saved tensors do not have the expected names and shapes, or ''."""
    if set(tensors) != set(shapes):
        return f'its {kind} has {", ".join(tensors) or "nothing"}, not {", ".join(shapes)}'
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            return f'{name} has shape {tuple(tensor.shape)}, not {shapes[name]}'
        if not bool(tensor.isfinite().all()):
            return f'{name} is not finite'
    return ''
