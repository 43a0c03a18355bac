"""Which layers of a model are preconditioned, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .layers import LAYER_TYPES, Layer


@dataclass(frozen=True)
class LeftOut:
    """A module whose parameters take the plain rule.

    Attributes:
        name: The module's name in the model.
        kind: Its class name.
        reason: Why it is not preconditioned.
    """

    name: str
    kind: str
    reason: str


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside `DistributedDataParallel` or `DataParallel`.

    Raises:
        ValueError: If the model is sharded (FSDP), which hides whole weights from us.
    """
    kinds = {type(module).__name__ for module in model.modules()}
    sharded = any(type(p).__name__ == 'DTensor' or type(p).__name__ == 'FlatParameter'
                  for p in model.parameters())
    if sharded or any(kind in ('FullyShardedDataParallel', 'FSDPModule') for kind in kinds):
        raise ValueError('the model is sharded by FSDP, whose weights cannot be preconditioned as '
                         'matrices; use DistributedDataParallel instead')
    wrappers = (nn.parallel.DistributedDataParallel, nn.parallel.DataParallel)
    return model.module if isinstance(model, wrappers) else model


def find_layers(model: nn.Module, groups: Iterable[dict[str, Any]], *,
                capture_mb: float = 64.) -> tuple[dict[str, Layer], list[LeftOut]]:
    """Finds the layers of a model whose weights an optimizer holds.

    Args:
        model: The unwrapped model.
        groups: The optimizer's parameter groups; ``precondition=False`` in a group leaves its
            weights to the rule, and its biases out of their layer's matrix.
        capture_mb: Limit for laid-out convolution patches, in megabytes.

    Returns:
        Layers by the name of their (first) module, in module order, and the modules left out.
    """
    owned = {id(p): group for group in groups for p in group['params']}
    names = {id(p): name for name, p in model.named_parameters()}
    layers: dict[str, Layer] = {}
    by_weight: dict[int, tuple[str, Layer]] = {}
    left_out: list[LeftOut] = []
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if not own:
            continue
        reason = _reason_against(module, owned)
        weight = module._parameters.get('weight')
        if not reason and id(weight) in by_weight:
            first_name, layer = by_weight[id(weight)]
            reason = _reason_against_sharing(layer, module)
            if reason:  # half a statistic is worse than none
                layers.pop(first_name, None)
                left_out.append(LeftOut(first_name, type(layer.modules[0]).__name__, reason))
            else:
                layer.modules.append(module)
                continue
        if reason:
            left_out.append(LeftOut(name, type(module).__name__, reason))
            continue
        bias = module._parameters.get('bias')
        if bias is not None and not _takes_part(bias, owned):
            bias = None
        layer = LAYER_TYPES[type(module)](names[id(weight)], module, weight, bias,
                                          capture_mb=capture_mb,
                                          damping=owned[id(weight)].get('damping'))
        layers[name] = layer
        by_weight[id(weight)] = name, layer
    return layers, left_out


def _takes_part(parameter: torch.Tensor, owned: dict[int, dict[str, Any]]) -> bool:
    group = owned.get(id(parameter))
    return group is not None and bool(group.get('precondition', True))


def _reason_against(module: nn.Module, owned: dict[int, dict[str, Any]]) -> str:
    """Why a module that owns parameters cannot be preconditioned, or ''."""
    if type(module) not in LAYER_TYPES:
        return 'type is not supported'
    weight = module._parameters.get('weight')
    if weight is None:
        return 'weight is not a plain parameter (parametrised or replaced)'
    if id(weight) not in owned:
        return 'weight is not in the optimizer'
    if not _takes_part(weight, owned):
        return 'precondition=False'
    if not weight.is_floating_point():
        return f'weight is {weight.dtype}'
    return ''


def _reason_against_sharing(layer: Layer, module: nn.Module) -> str:
    """Why a second module cannot share a layer's statistics, or ''."""
    first = layer.modules[0]
    if type(first) is not type(module):
        return 'its weight is shared with a module of another type'
    if first.bias is not module.bias:
        return 'its weight is shared with a module that has another bias'
    return ''
