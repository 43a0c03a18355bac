"""Which modules are which kind of layer."""

from __future__ import annotations

from torch import nn

from .conv import Conv2dLayer
from .layer import Layer
from .linear import LinearLayer

#: Supported module classes, by exact type (a subclass may compute something else). Those of
#: packages that are not imported here go by qualified name; mmcv's differ from torch's on empty
#: inputs and old versions only.
LAYER_TYPES: dict[type[nn.Module] | str, type[Layer]] = {
    nn.Linear: LinearLayer,
    nn.Conv2d: Conv2dLayer,
    'mmcv.cnn.bricks.wrappers.Linear': LinearLayer,
    'mmcv.cnn.bricks.wrappers.Conv2d': Conv2dLayer,
}


def qualified_name(kind: type) -> str:
    """Module and name of a class."""
    return f'{kind.__module__}.{kind.__qualname__}'


def layer_type(module: nn.Module) -> type[Layer] | None:
    """The kind of layer that a module is, or None."""
    kind = type(module)
    return LAYER_TYPES.get(kind) or LAYER_TYPES.get(qualified_name(kind))
