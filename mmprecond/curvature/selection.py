"""Which layers of a model are preconditioned, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

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
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            users.setdefault(id(p), []).append(module)
    layers: dict[str, Layer] = {}
    left_out: list[LeftOut] = []
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        weight, bias = (module._parameters.get(key) for key in ('weight', 'bias'))
        sharing = users.get(id(weight), [module])
        reason = _reason_against(module, owned) or _reason_against_sharing(sharing)
        if reason:
            left_out.append(LeftOut(name, type(module).__name__, reason))
        elif module is sharing[0]:
            joint = bias is not None and _joins(bias, weight, owned, users)
            layers[name] = LAYER_TYPES[type(module)](
                names[id(weight)], sharing, weight, bias if joint else None,
                capture_mb=capture_mb, damping=owned[id(weight)].get('damping'))
    return layers, left_out


def _joins(bias: Tensor, weight: Tensor, owned: dict[int, dict[str, Any]],
           users: dict[int, list[nn.Module]]) -> bool:
    """Whether a bias is preconditioned with its weight: trained with it, and with no other."""
    weights = {id(module._parameters.get('weight')) for module in users[id(bias)]}
    trained = bias.requires_grad or not weight.requires_grad
    return trained and _takes_part(bias, owned) and weights == {id(weight)}


def _takes_part(parameter: Tensor, owned: dict[int, dict[str, Any]]) -> bool:
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


def _reason_against_sharing(modules: list[nn.Module]) -> str:
    """Why modules that use one weight cannot share its statistics, or ''."""
    first = modules[0]
    for module in modules[1:]:
        if type(module) is not type(first):
            return f'its weight is also used by a {type(module).__name__}'
        if module._parameters.get('bias') is not first._parameters.get('bias'):
            return 'its weight is shared with a module that has another bias'
        if getattr(module, 'groups', 1) != getattr(first, 'groups', 1):
            return 'its weight is shared with a module of other groups'
    return ''
