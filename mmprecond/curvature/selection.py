"""Selection of the layers of a model that are preconditioned, with reasons for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from ..checks import first_names
from .flattened import find_flattened
from .layer import Layer
from .linear import LinearLayer
from .registry import AttentionTypes, layer_type


@dataclass(frozen=True)
class AttentionReading:
    """Reading of attention modules as a whole.

    Attributes:
        windows: Most windows measured in one call of a module.
        bias: Whether the bias of the projections is joint with their weight.
    """

    windows: int = 256
    bias: bool = False


@dataclass(frozen=True)
class LeftOut:
    """A module whose parameters take the plain rule.

    Attributes:
        name: The module's name in the model; of parameters that are not in it, their groups.
        kind: Name of its class.
        reason: Reason why it is not preconditioned.
    """

    name: str
    kind: str
    reason: str


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the user's module inside data parallelism and `torch.compile`.

    Raises:
        ValueError: If the model is sharded (FSDP), which hides whole weights.
    """
    kinds = {type(module).__name__ for module in model.modules()}
    sharded = any(
        type(p).__name__ == 'DTensor' or type(p).__name__ == 'FlatParameter'
        for p in model.parameters()
    )
    if sharded or 'FullyShardedDataParallel' in kinds:
        raise ValueError(
            'the model is sharded by FSDP, whose weights cannot be preconditioned as '
            'matrices; use DistributedDataParallel instead'
        )
    wrappers = (nn.parallel.DistributedDataParallel, nn.parallel.DataParallel)
    inner: Any = model
    while isinstance(inner, wrappers) or hasattr(inner, '_orig_mod'):
        inner = inner.module if isinstance(inner, wrappers) else inner._orig_mod
    return inner


def unwrap_measured(model: nn.Module) -> nn.Module:
    """`unwrap` for a model whose layers are to be measured.

    Raises:
        ValueError: If the model is sharded, is copied to several devices within one process, or is
            on an Apple GPU, which lacks float64 and most of the solvers.
    """
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise ValueError(
            f'DataParallel copies the model to {len(model.device_ids)} devices, where its layers '
            'cannot be measured; use DistributedDataParallel, or device_ids with one device'
        )
    inner = unwrap(model)
    if any(p.device.type == 'mps' for p in inner.parameters()):
        raise ValueError(
            'the model is on an Apple GPU (mps), which lacks float64 and solvers that '
            'preconditioners need; move it to the CPU or to a CUDA device'
        )
    return inner


def find_layers(
    model: nn.Module,
    groups: Iterable[dict[str, Any]],
    *,
    capture_mb: float = 64.0,
    attention: Callable[[str], AttentionReading | None] = lambda name: None,
    joins_bias: Callable[[str], bool] = lambda name: True,
    types: AttentionTypes | None = None,
) -> tuple[dict[str, Layer], list[LeftOut]]:
    """Finds the layers of a model whose weights an optimizer holds.

    Args:
        model: The unwrapped model.
        groups: The optimizer's parameter groups. ``precondition=False`` in a group leaves its
            weights to the rule, and its biases out of their layer's matrix. ``input_positions=49``
            says that its linear layers read a flattened feature map of 49 positions. For box heads
            this is found (see `find_flattened`), unless the group says otherwise.
        capture_mb: Limit for laid-out convolution patches and attention matrices, in megabytes.
        attention: Function that returns the reading of an attention module, given the name of its
            projection, or None to treat its linear layers one by one.
        joins_bias: Function that tells whether a layer's bias is a column of its matrix, given the
            name of its module; otherwise the bias takes the plain rule.
        types: What `attention_types` says of the model; default: nothing is attention.

    Returns:
        Layers by the name of their (first) module, in module order, and the modules left out.

    Raises:
        ValueError: If `input_positions` does not fit a layer.
    """
    return _Search(model, groups, capture_mb, attention, joins_bias, types or {}).run()


class _Search:
    """One search (see `find_layers`)."""

    def __init__(
        self,
        model: nn.Module,
        groups: Iterable[dict[str, Any]],
        capture_mb: float,
        attention: Callable[[str], AttentionReading | None],
        joins_bias: Callable[[str], bool],
        types: AttentionTypes,
    ) -> None:
        self.model = model
        self.capture_mb = capture_mb
        self.attention = attention
        self.joins_bias = joins_bias
        self.types = types
        self.groups = list(groups)
        self.owned = {id(p): group for group in self.groups for p in group['params']}
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.flattened = find_flattened(model)
        self.users: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for p in module.parameters(recurse=False):
                self.users.setdefault(id(p), []).append(module)
        self.layers: dict[str, Layer] = {}
        self.left_out: list[LeftOut] = []
        self.claimed: dict[nn.Module, str] = {}

    def run(self) -> tuple[dict[str, Layer], list[LeftOut]]:
        for name, module in self.model.named_modules():  # a block comes before its parts
            self._visit_attention(name, module)
            if module not in self.claimed and any(True for _ in module.parameters(recurse=False)):
                self._visit(name, module)
        self._visit_foreign_parameters()
        return self.layers, self.left_out

    def _visit_foreign_parameters(self) -> None:
        """Leaves out the optimizer's parameters that are not the model's."""
        places = [
            f'{" x ".join(map(str, p.shape)) or "scalar"} in group {k}'
            for k, group in enumerate(self.groups)
            for p in group['params']
            if id(p) not in self.names
        ]
        if places:
            reason = f'{len(places)} of the optimizer that are not in the model'
            self.left_out.append(LeftOut(first_names(places), 'parameters', reason))

    def _visit(self, name: str, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            kind_name = getattr(module, 'original_name', type(module).__name__)
            self.left_out.append(LeftOut(name, kind_name, 'a scripted module calls no hooks'))
            return
        weight: Any = module._parameters.get('weight')
        bias = module._parameters.get('bias')
        sharing = self.users.get(id(weight), [module])
        kind = layer_type(module)
        reason = (
            _type_refusal(module)
            if kind is None
            else _weight_refusal(weight, self.owned)
            or kind.refusal(module)
            or _sharing_refusal(module, sharing, kind)
        )
        if kind is None or reason:
            self.left_out.append(LeftOut(name, type(module).__name__, reason))
        elif module is sharing[0]:
            joins = kind.joins_bias and self.joins_bias(name)
            joint = joins and bias is not None and self._is_joint_bias(bias, weight)
            self.layers[name] = kind(
                self.names[id(weight)],
                sharing,
                weight,
                bias if joint else None,
                **self._layer_options(kind, weight, module),
            )

    def _visit_attention(self, name: str, block: nn.Module) -> None:
        """Takes the projections of an attention module as one layer, where that is wanted."""
        kind, reason = self.types.get(block, (None, ''))
        if kind is None and not reason:
            return
        part, key = kind.weight_owner(block) if kind else ('qkv', 'weight')
        module: Any = getattr(block, part, None) if part else block
        owner = name if module is None else f'{name}.{part}'.strip('.')
        reading = self.attention(owner)
        if reading is None and kind is not None:
            return
        weight: Any = module._parameters.get(key) if isinstance(module, nn.Module) else None
        if not reason and (module in self.claimed or len(self.users.get(id(weight), [])) > 1):
            reason = 'its weight is shared with another module'
        reason = reason or _weight_refusal(weight, self.owned)
        if module is not None:
            before = self.claimed.setdefault(module, owner)
            if self.layers.pop(before, None):
                self.left_out.append(LeftOut(before, type(block).__name__, reason))
        if reason:
            self.left_out.append(LeftOut(owner, type(block).__name__, reason))
        elif kind and reading:
            bias = module._parameters.get(key.replace('weight', 'bias'))
            joint = reading.bias and bias is not None and self._is_joint_bias(bias, weight)
            self.layers[owner] = kind(
                self.names[id(weight)],
                [block],
                weight,
                bias if joint else None,
                max_windows=reading.windows,
                **self._layer_options(kind, weight, block),
            )

    def _is_joint_bias(self, bias: Tensor, weight: Tensor) -> bool:
        """True if a bias may join its weight: both are trained and have the same modules."""
        trained = bias.requires_grad or not weight.requires_grad
        return (
            trained
            and _is_preconditioned(bias, self.owned)
            and self.users[id(bias)] == self.users[id(weight)]
        )

    def _layer_options(
        self, kind: type[Layer], weight: Tensor, module: nn.Module
    ) -> dict[str, Any]:
        group = self.owned[id(weight)]
        options: dict[str, Any] = dict(capture_mb=self.capture_mb)
        given = group.get('input_positions')
        if issubclass(kind, LinearLayer):
            return options | dict(input_positions=given or self.flattened.get(module, 1))
        if given is not None and given > 1:
            raise ValueError(
                f'input_positions={given} is for linear layers, and {self.names[id(weight)]} is of '
                f'a {type(module).__name__}; give it in a group or a key of custom_keys that holds '
                'the weight of the linear layer alone'
            )
        return options


def _is_preconditioned(parameter: Tensor, owned: dict[int, dict[str, Any]]) -> bool:
    group = owned.get(id(parameter))
    return group is not None and bool(group.get('precondition', True))


def _type_refusal(module: Any) -> str:
    """Reason why the parameters that a module owns belong to no layer."""
    if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return 'nn.MultiheadAttention uses its weight without calling it'
    if is_parametrized(module):
        return f'{", ".join(module.parametrizations)} is parametrised, no plain parameter'
    if isinstance(module, ParametrizationList):
        return 'parameters of a parametrised weight'
    if any(True for _ in module.children()):
        names = ', '.join(name for name, _ in module.named_parameters(recurse=False))
        return f'{names}: no weight of a layer; its layers are listed apart'
    return 'type is not supported'


def _weight_refusal(weight: Tensor | None, owned: dict[int, dict[str, Any]]) -> str:
    """Reason why a weight cannot be preconditioned, or ''."""
    if weight is None:
        return 'weight is not a plain parameter (parametrised or replaced)'
    if id(weight) not in owned:
        return 'weight is not in the optimizer'
    if not _is_preconditioned(weight, owned):
        return 'precondition=False'
    if not weight.is_floating_point():
        return f'weight is {weight.dtype}'
    if not weight.numel():
        return 'weight has no entries'
    return ''


def _sharing_refusal(module: nn.Module, users: list[nn.Module], kind: type[Layer]) -> str:
    """Reason why a module cannot share its weight's statistics with its other users, or ''."""
    for other in users:
        if type(other) is not type(module):
            return f'its weight is also used by a {type(other).__name__}'
        if other._parameters.get('bias') is not module._parameters.get('bias'):
            return 'its weight is shared with a module that has another bias'
        if kind.count_blocks(other) != kind.count_blocks(module):
            return 'its weight is shared with a module of other groups'
    return ''
