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
    find_matrices,
    matrix_dims,
    unread_attention,
)
from ..preconditioners import Preconditioner, check_statistics
from .assignment import Assignment, BoundAssignment
from .options import CurvatureOptions

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
    options: CurvatureOptions,
) -> Coverage:
    """Gives each layer of a model its preconditioner.

    Args:
        model: The unwrapped model.
        groups: The optimizer's parameter groups.
        method: The preconditioner of every supported layer, or one for each by an assignment.
        owner: The optimizer's name, for errors.
        options: Settings for all layers.

    Returns:
        The layers with their preconditioners, and the modules without.

    Raises:
        ValueError: If there is no layer to precondition, an entry is never used, or no method can
            take the fallback.
    """
    assignment = method if isinstance(method, Assignment) else Assignment(method)
    fallback = options.fallback == 'gradient'
    if fallback and not any(chosen.with_gradient_source() for chosen in assignment.methods):
        raise ValueError(
            f"fallback='gradient' is for NKFAC, AdaBK, AdamR and FSGD, and {owner} has none of "
            'them; leave it out'
        )
    types = attention_types(model)
    bound = assignment.bind(model, types)
    layers, left_out = _find_layers(model, groups, bound, types, options.capture_mb)
    methods, refused = _choose(layers, bound)
    matrices = _matrices(model, groups, bound, methods, fallback)
    bound.check_use([*layers, *(name for name, _, _ in matrices)])
    methods |= {layer: chosen for _, layer, chosen in matrices}
    left_out = _still_left_out(model, [*left_out, *refused], methods)
    if not methods:
        raise ValueError(
            f'{owner} found no layer to precondition: {_no_layer_reason(layers, left_out)}'
        )
    unread = _unread(model, types, owner) if assignment.reads_attention else []
    return Coverage(methods, left_out, unread, _idle(assignment, methods))


def _find_layers(
    model: nn.Module,
    groups: Sequence[dict[str, Any]],
    bound: BoundAssignment,
    types: AttentionTypes,
    capture_mb: float,
) -> tuple[dict[str, Layer], list[LeftOut]]:
    """Layers by name as their methods read them, and modules that are none."""

    def reading(name: str) -> AttentionReading | None:
        chosen = bound.method(name)
        return chosen.attention_reading if chosen else None

    def joins_bias(name: str) -> bool:
        chosen = bound.method(name)
        return chosen is None or chosen.joins_bias

    return find_layers(
        model, groups, capture_mb=capture_mb, attention=reading, joins_bias=joins_bias, types=types
    )


def _choose(
    layers: Mapping[str, Layer], bound: BoundAssignment
) -> tuple[dict[Layer, Preconditioner], list[LeftOut]]:
    """Methods of the layers, and layers that their method does not take."""
    methods: dict[Layer, Preconditioner] = {}
    refused = []
    for name, layer in layers.items():
        chosen = bound.method(name)
        reason = _fallback_reason(name, layer, bound)
        if chosen is None or reason:
            refused.append(LeftOut(name, type(layer.modules[0]).__name__, reason))
        else:
            methods[layer] = chosen
    return methods, refused


def _idle(assignment: Assignment, methods: Mapping[Layer, Preconditioner]) -> list[Preconditioner]:
    """Methods of optional entries that no layer has."""
    return [
        entry.preconditioner
        for entry in assignment.entries
        if entry.optional and entry.preconditioner
        if entry.preconditioner not in methods.values()
    ]


def _matrices(
    model: nn.Module,
    groups: Sequence[dict[str, Any]],
    bound: BoundAssignment,
    methods: Mapping[Layer, Preconditioner],
    fallback: bool,
) -> list[tuple[str, Layer, Preconditioner]]:
    """Parameters that take statistics of their gradient matrix, as no layer reads them.

    Returns:
        Names of their modules, layers, and their methods: those on gradients alone, and with
        `fallback` all others that have such a form.
    """
    taken = {p for layer in methods for p in layer.parameters}
    found: list[tuple[str, Layer, Preconditioner]] = []
    for name, layer in find_matrices(model, groups, taken):
        method = bound.method(name)
        if method is None:
            continue
        chosen = method.with_gradient_source()
        if chosen is None and bound.open_method:  # such as AFOpt on attention
            chosen = bound.open_method.with_gradient_source()
        if chosen and (fallback or chosen == method) and chosen.selected_statistics(layer):
            found.append((name, layer, chosen))
    return found


def _still_left_out(
    model: nn.Module, left_out: Sequence[LeftOut], methods: Mapping[Layer, Preconditioner]
) -> list[LeftOut]:
    """Modules of which a matrix takes the plain rule, and those without any matrix."""
    taken = {p for layer in methods for p in layer.parameters}
    modules = dict(model.named_modules())

    def stays(left: LeftOut) -> bool:
        own = modules[left.name].parameters(recurse=False) if left.name in modules else ()
        matrices = [p for p in own if len(matrix_dims(p)) > 1]
        return not matrices or any(p not in taken for p in matrices)

    return [left for left in left_out if stays(left)]


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
    if not candidates and (setting := method.exclusion_setting(layer)):
        return setting
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
