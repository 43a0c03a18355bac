"""Preconditioner of each layer of a model, and reasons for layers without one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..curvature import (
    AttentionReading,
    AttentionTypes,
    Layer,
    LeftOut,
    attention_types,
    find_layers,
    unread_attention,
)
from ..preconditioners import Preconditioner, check_statistics
from .assignment import Assignment, BoundAssignment

logger = logging.getLogger('mmprecond')


@dataclass
class Coverage:
    """Layers of a model with a preconditioner, and modules without.

    Attributes:
        methods: Preconditioner of each layer.
        left_out: Modules that take the plain rule, with the reasons.
        unread: Attention modules that a method asks for but that are not read as a whole.
        idle: Methods for attention modules that take no layer.
    """

    methods: dict[Layer, Preconditioner]
    left_out: list[LeftOut]
    unread: list[LeftOut]
    idle: list[Preconditioner]


def assign_methods(
    model: nn.Module,
    groups: Sequence[dict[str, Any]],
    method: Preconditioner | Assignment,
    owner: str,
    capture_mb: float,
) -> Coverage:
    """Gives each layer of a model its preconditioner.

    Args:
        model: The unwrapped model.
        groups: The optimizer's parameter groups.
        method: The preconditioner of every supported layer, or one for each by an assignment.
        owner: The optimizer's name, for errors.
        capture_mb: Limit in megabytes for laid-out patches (see `find_layers`).

    Returns:
        The layers with their preconditioners, and the modules without.

    Raises:
        ValueError: If there is no layer to precondition, or an entry is never used.
    """
    assignment = method if isinstance(method, Assignment) else Assignment(method)
    types = attention_types(model)
    bound = assignment.bind(model, types)

    def reading(name: str) -> AttentionReading | None:
        chosen = bound.method(name)
        return chosen.attention_reading if chosen else None

    layers, left_out = find_layers(
        model, groups, capture_mb=capture_mb, attention=reading, types=types
    )
    bound.check_use(list(layers))
    methods: dict[Layer, Preconditioner] = {}
    for name, layer in layers.items():
        chosen = bound.method(name)
        reason = _fallback_reason(name, layer, bound)
        if chosen is None or reason:
            left_out.append(LeftOut(name, type(layer.modules[0]).__name__, reason))
        else:
            methods[layer] = chosen
    if not methods:
        raise ValueError(
            f'{owner} found no layer to precondition: {_no_layer_reason(layers, left_out)}'
        )
    unread = _unread(model, types, owner) if assignment.reads_attention else []
    idle = [
        entry.preconditioner
        for entry in assignment.entries
        if entry.optional and entry.preconditioner
        if entry.preconditioner not in methods.values()
    ]
    return Coverage(methods, left_out, unread, idle)


def _unread(model: nn.Module, types: AttentionTypes, owner: str) -> list[LeftOut]:
    """Attention modules that are not read as a whole, with a warning."""
    modules = dict(model.named_modules())
    found = [
        LeftOut(name, type(modules[name]).__name__, reason)
        for name, reason in unread_attention(model, types).items()
    ]
    for (kind, reason), number in Counter((left.kind, left.reason) for left in found).items():
        logger.warning(
            '%s does not read %d x %s as attention: %s. Their linear layers are taken one by one.',
            owner,
            number,
            kind,
            reason,
        )
    return found


def _fallback_reason(name: str, layer: Layer, bound: BoundAssignment) -> str:
    """Reason why a layer takes the plain rule, or ''."""
    method = bound.method(name)
    if method is None:
        return (
            'preconditioner=None'
            if bound.entry(name) is not None
            else 'no entry of layers matches it'
        )
    kind, candidates = type(method).__name__, method.candidate_statistics(layer)
    check_statistics(kind, candidates)
    if not candidates:
        return f'{kind} has no statistic for a {type(layer).__name__}'
    for statistic in candidates:
        reason = layer.lacks(statistic)
        if reason:
            return f'{kind} needs {statistic.key}: {reason}'
    if not method.selected_statistics(layer):
        return f'{layer.rows} x {layer.columns} is over max_dim={method.max_dim}'
    return ''


def _no_layer_reason(layers: Mapping[str, Layer], left_out: Sequence[LeftOut]) -> str:
    """Reason why a model has nothing to precondition."""
    if layers:
        reasons = sorted({left.reason for left in left_out if left.name in layers})
        return f'all {len(layers)} are left to the plain rule ({"; ".join(reasons)})'
    refusals = sorted({f'{left.kind}: {left.reason}' for left in left_out})
    return (
        f'its modules with parameters are {"; ".join(refusals) or "none"}; it needs a Linear or a '
        'convolution whose weight is in params'
    )
