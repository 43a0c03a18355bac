"""Layer types of module classes, and their registration."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .attention import (
    ATTENTION_TYPES,
    UNCALLED,
    UNREADABLE,
    AttentionLayer,
    PackedAttention,
    recognise,
)
from .conv import Conv1dLayer, Conv2dLayer, Conv3dLayer, ConvTranspose2dLayer
from .layer import Layer
from .linear import LinearLayer

#: Layer types by the exact module class, because a subclass may compute something else. Classes of
#: packages that are not imported here have their qualified name as key. The classes of mmcv differ
#: from those of torch only for empty inputs and old versions.
LAYER_TYPES: dict[type[nn.Module] | str, type[Layer]] = {
    nn.Linear: LinearLayer,
    nn.Conv1d: Conv1dLayer,
    nn.Conv2d: Conv2dLayer,
    nn.Conv3d: Conv3dLayer,
    nn.ConvTranspose2d: ConvTranspose2dLayer,
    'mmcv.cnn.bricks.wrappers.Linear': LinearLayer,
    'mmcv.cnn.bricks.wrappers.Conv2d': Conv2dLayer,
    'mmcv.cnn.bricks.wrappers.Conv3d': Conv3dLayer,
    'mmcv.cnn.bricks.wrappers.ConvTranspose2d': ConvTranspose2dLayer,
}

#: Layer type of each module that is read as attention, or None; and the reason, or ''.
AttentionTypes = Mapping[nn.Module, tuple[type[AttentionLayer] | None, str]]

__all__ = [
    'ATTENTION_TYPES',
    'LAYER_TYPES',
    'AttentionTypes',
    'attention_type',
    'attention_types',
    'layer_type',
    'qualified_name',
    'register_attention',
    'register_layer',
    'unread_attention',
]


def qualified_name(kind: type) -> str:
    """Module and name of a class."""
    return f'{kind.__module__}.{kind.__qualname__}'


def layer_type(module: nn.Module) -> type[Layer] | None:
    """Layer type of a module, or None."""
    kind = type(module)
    return LAYER_TYPES.get(kind) or LAYER_TYPES.get(qualified_name(kind))


def attention_type(module: nn.Module) -> tuple[type[AttentionLayer] | None, str]:
    """Layer type that reads an attention module as a whole, or None; and a reason, or ''.

    An unregistered class is tested by `recognise`. Subclasses of `nn.MultiheadAttention` are read
    if they keep its `forward`.

    Returns:
        (type, ''): the module is read. (type, reason): its type is known, but it cannot be read.
        (None, reason): its `qkv` cannot be seen by a hook. (None, ''): it is no known attention.
    """
    kind = type(module)
    name = qualified_name(kind)
    reader = ATTENTION_TYPES.get(name)
    if name in UNREADABLE:
        return reader, UNREADABLE[name](module)
    if reader is None and getattr(kind, 'forward', None) is nn.MultiheadAttention.forward:
        reader = PackedAttention
    if reader is None:
        reader, reason = recognise(module)
        return reader, reason if reason == UNCALLED else ''
    return reader, reader.refusal(module)


def attention_types(model: nn.Module) -> AttentionTypes:
    """Results of `attention_type` for each module of a model."""
    return {module: attention_type(module) for module in model.modules()}


def unread_attention(model: nn.Module, types: AttentionTypes) -> dict[str, str]:
    """Reasons why attention modules of a model cannot be read as a whole, by their names.

    A module counts as attention if its class's name says so and it has `num_heads`; channel
    attention (squeeze and excitation) lacks it. If such modules are nested, as in Swin's
    `ShiftWindowMSA`, the innermost counts.
    """
    reasons: dict[str, str] = {}
    inner: set[nn.Module] = set()
    for name, module in reversed(list(model.named_modules())):
        kind, reason = types[module]
        if kind is None and not _is_named_attention(module) or inner & set(module.modules()):
            continue
        inner.add(module)
        if kind is None or reason:
            reasons[name] = reason or recognise(module)[1]
    return reasons


def _is_named_attention(module: nn.Module) -> bool:
    """True for a module with heads and weighted parts whose class has the name of an attention."""
    words = [word for word in ('attention', 'attn', 'msa') if word in type(module).__name__.lower()]
    parts = (part for part in module.modules() if part is not module)
    heads = isinstance(getattr(module, 'num_heads', None), int)
    return bool(words) and heads and any(list(part.parameters()) for part in parts)


def register_layer(module_type: type[nn.Module] | str, layer: type[Layer]) -> None:
    """Registers a layer type for a module class, so that its modules are preconditioned.

    Args:
        module_type: The exact class, or its qualified name to avoid an import.
        layer: Layer type that reads modules of the class.

    Raises:
        TypeError: If `layer` is no subclass of `Layer`, or cannot read modules of the class. (For a
            class given by name, the latter shows in a model's layer table.)
    """
    if not (isinstance(layer, type) and issubclass(layer, Layer)):
        raise TypeError(f'register_layer takes a subclass of Layer, not {layer!r}')
    if issubclass(layer, AttentionLayer):
        raise TypeError(f'{layer.__name__} reads attention modules; use register_attention')
    _check_module_type(module_type)
    missing = layer.missing_methods()
    if missing:
        raise TypeError(f'{layer.__name__} must define {", ".join(missing)}')
    if isinstance(module_type, type) and (reason := layer.type_refusal(module_type)):
        raise TypeError(
            f'register_layer({module_type.__name__}, {layer.__name__}): {reason}; '
            'write a Layer for it'
        )
    LAYER_TYPES[module_type] = layer


def register_attention(module_type: type[nn.Module] | str, layer: type[AttentionLayer]) -> None:
    """Registers a layer type for a class of attention modules, to read them as a whole.

    Args:
        module_type: The exact class, or its qualified name.
        layer: Layer type that reads modules of the class. The layer table of a model says so if it
            cannot read one of them.

    Raises:
        TypeError: If `layer` is no subclass of `AttentionLayer` or does not define `read`, or
            `module_type` is neither a module class nor a qualified name.
    """
    if not (isinstance(layer, type) and issubclass(layer, AttentionLayer)):
        raise TypeError(f'register_attention takes a subclass of AttentionLayer, not {layer!r}')
    if layer.read is AttentionLayer.read:
        raise TypeError(f'{layer.__name__} must define read')
    _check_module_type(module_type)
    name = module_type if isinstance(module_type, str) else qualified_name(module_type)
    ATTENTION_TYPES[name] = layer


def _check_module_type(module_type: object) -> None:
    """Raises TypeError unless the argument is a module class or the name of one."""
    if isinstance(module_type, str) and '.' in module_type:
        return
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(
            f'{getattr(module_type, "__name__", repr(module_type))} is no nn.Module; '
            "give a module class, or its qualified name ('package.module.Class')"
        )
