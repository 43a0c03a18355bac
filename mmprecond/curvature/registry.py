"""Which modules are which kind of layer, and how to add one."""

from __future__ import annotations

from torch import nn

from .attention import ATTENTION_TYPES, UNREADABLE, AttentionLayer
from .conv import Conv1dLayer, Conv2dLayer, Conv3dLayer, ConvTranspose2dLayer
from .layer import Layer
from .linear import LinearLayer

#: Supported module classes, by exact type (a subclass may compute something else). Those of
#: packages that are not imported here go by qualified name; mmcv's differ from torch's on empty
#: inputs and old versions only.
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

__all__ = [
    'ATTENTION_TYPES',
    'LAYER_TYPES',
    'attention_type',
    'layer_type',
    'qualified_name',
    'register_attention',
    'register_layer',
]


def qualified_name(kind: type) -> str:
    """Module and name of a class."""
    return f'{kind.__module__}.{kind.__qualname__}'


def layer_type(module: nn.Module) -> type[Layer] | None:
    """The kind of layer that a module is, or None."""
    kind = type(module)
    return LAYER_TYPES.get(kind) or LAYER_TYPES.get(qualified_name(kind))


def attention_type(module: nn.Module) -> tuple[type[AttentionLayer] | None, str]:
    """Reader of an attention module as a whole, or None; and the reason why not, or ''."""
    name = qualified_name(type(module))
    kind = ATTENTION_TYPES.get(name)
    if name in UNREADABLE:
        return kind, UNREADABLE[name](module)
    return kind, kind.refusal(module) if kind else ''


def register_layer(module_type: type[nn.Module] | str, layer: type[Layer]) -> None:
    """Preconditions modules of one more class.

    Args:
        module_type: The exact class, or its qualified name where it is not to be imported.
        layer: The kind of layer that reads it.

    Raises:
        TypeError: For what is no `Layer`, or one that cannot read modules of the class. (Of a
            class that is named, that shows when a model is built.)
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
    """Reads one more class of attention modules as a whole.

    Args:
        module_type: The exact class, or its qualified name.
        layer: The kind of layer that reads it; whether it can read a module shows when a model is
            built, and then stands in the table.

    Raises:
        TypeError: For what is no `AttentionLayer`.
    """
    if not (isinstance(layer, type) and issubclass(layer, AttentionLayer)):
        raise TypeError(f'register_attention takes a subclass of AttentionLayer, not {layer!r}')
    if layer.read is AttentionLayer.read:
        raise TypeError(f'{layer.__name__} must define read')
    _check_module_type(module_type)
    name = module_type if isinstance(module_type, str) else qualified_name(module_type)
    ATTENTION_TYPES[name] = layer


def _check_module_type(module_type: object) -> None:
    """Raises TypeError unless it is a module class, or the name of one."""
    if isinstance(module_type, str) and '.' in module_type:
        return
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(
            f'{getattr(module_type, "__name__", repr(module_type))} is no nn.Module; '
            "give a module class, or its qualified name ('package.module.Class')"
        )
